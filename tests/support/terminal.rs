//! A real terminal: a window of tmux, whose screen can be looked at.

use std::process::{Command, Output};

use super::wait_until;

/// A program in a window; both end when dropped.
pub struct Terminal {
    dir: tempfile::TempDir,
}

impl Terminal {
    /// Runs a line of bash, which may not contain single quotes. `None`, with a message: there is no tmux.
    pub fn start(columns: u16, env: &[(&str, &str)], line: &str) -> Option<Self> {
        if Command::new("tmux").arg("-V").output().is_err() {
            eprintln!("tmux is not there: nothing was seen of the live view");
            return None;
        }
        let out = Self { dir: tempfile::tempdir().expect("a directory") };
        // What comes after the program is left on the screen, and `cat` keeps it there.
        let line = format!("trap : INT; echo before; {line}; echo \"code $?\"; exec cat");
        let mut command = out.command();
        command.args(["-f", "/dev/null", "new-session", "-d", "-y", "24", "-x", &columns.to_string()]);
        env.iter().for_each(|(name, value)| {
            command.args(["-e", &format!("{name}={value}")]);
        });
        let started = command.args(["bash", "-c", &line]).output().expect("tmux runs");
        assert!(started.status.success(), "{}", String::from_utf8_lossy(&started.stderr));
        Some(out)
    }

    fn command(&self) -> Command {
        let mut command = Command::new("tmux");
        command.env_remove("TMUX").env("LC_ALL", "C.UTF-8").arg("-u").arg("-S").arg(self.dir.path().join("socket"));
        command
    }

    fn tmux(&self, args: &[&str]) -> Output {
        self.command().args(args).output().expect("tmux runs")
    }

    /// What the screen shows, a line each. With colors as escape sequences if `raw`.
    pub fn screen(&self, raw: bool) -> String {
        let out = self.tmux(if raw { &["capture-pane", "-p", "-e"] } else { &["capture-pane", "-p"] });
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Waits until the screen shows all of these.
    pub async fn shows(&self, texts: &[&str]) -> String {
        let mut screen = String::new();
        wait_until(&format!("the screen shows {texts:?}"), async || {
            screen = self.screen(false);
            texts.iter().all(|t| screen.contains(t))
        })
        .await;
        screen
    }

    pub fn resize(&self, columns: u16) {
        self.tmux(&["resize-window", "-x", &columns.to_string()]);
    }

    /// Presses a key by tmux's name for it.
    pub fn press(&self, key: &str) {
        self.tmux(&["send-keys", key]);
    }

    /// One of tmux's own variables.
    pub fn variable(&self, name: &str) -> String {
        let out = self.tmux(&["display-message", "-p", &format!("#{{{name}}}")]);
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.tmux(&["kill-server"]);
    }
}
