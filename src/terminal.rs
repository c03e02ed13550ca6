//! The terminal on stderr: some lines at its bottom that are drawn again in place, and whatever else is said above them. A
//! leaf, since both the log and the commands write there.

use std::io::{self, IsTerminal as _, Write};
use std::sync::{Mutex, PoisonError};

use console::{Term, measure_text_width};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What stands at the bottom now; empty: nothing.
static BOTTOM: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Lines are cut, never wrapped, while the view is drawn; so each takes one row even if its width was counted wrong.
const NO_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";

/// Whether a stream can be drawn on: a terminal that can move its cursor.
fn draws(is_terminal: bool) -> bool {
    is_terminal && std::env::var_os("TERM").is_some_and(|t| !t.is_empty() && t != "dumb")
}

/// Whether stderr can be drawn on.
pub fn stderr_draws() -> bool {
    draws(io::stderr().is_terminal())
}

/// Whether stdout can be drawn on.
pub fn stdout_draws() -> bool {
    draws(io::stdout().is_terminal())
}

/// Rows and columns of the terminal at this moment; 24 and 80 where it does not say.
pub fn size() -> (usize, usize) {
    let known = [Term::stdout(), Term::stderr()].iter().find_map(Term::size_checked);
    known.filter(|s| s.0 > 0 && s.1 > 0).map_or((24, 80), |(rows, columns)| (rows.into(), columns.into()))
}

/// Whether the locale says that more than ASCII can be shown.
pub fn is_unicode() -> bool {
    let set = |name| std::env::var(name).ok().filter(|v| !v.is_empty());
    let locale = set("LC_ALL").or_else(|| set("LC_CTYPE")).or_else(|| set("LANG")).unwrap_or_default().to_lowercase();
    locale.contains("utf-8") || locale.contains("utf8")
}

/// Draws these lines in place of those that stand at the bottom of stderr. None: what stands there goes away.
pub fn draw(lines: Vec<String>) {
    let mut bottom = BOTTOM.lock().unwrap_or_else(PoisonError::into_inner);
    if *bottom == lines && !lines.is_empty() {
        return;
    }
    let text = erase(&bottom, size().1) + &drawn(&lines);
    *bottom = lines;
    // A terminal that went away is no reason to stop work.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Says a line on stderr, above what [`draw`] has put there.
pub fn print(line: &str) {
    let _ = Above.write_all(format!("{line}\n").as_bytes());
}

/// Stderr, above what [`draw`] has put at its bottom. What is written in one call stays together.
#[derive(Debug, Clone, Copy, Default)]
pub struct Above;

impl Write for Above {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        self.write_all(text).map(|()| text.len())
    }

    /// Never fails: whoever is told that a line of the log could not be written can only say so where it could not be.
    fn write_all(&mut self, text: &[u8]) -> io::Result<()> {
        let bottom = BOTTOM.lock().unwrap_or_else(PoisonError::into_inner);
        let mut stderr = io::stderr().lock();
        let _ = if bottom.is_empty() {
            stderr.write_all(text)
        } else {
            stderr.write_all(&[erase(&bottom, size().1).as_bytes(), text, drawn(&bottom).as_bytes()].concat())
        };
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The end of the terminal: SIGHUP.
#[derive(Debug)]
pub struct Hangup(Option<Signal>);

impl Hangup {
    /// Listens for it, unless whoever started us has it ignored, as nohup does: then we outlive the terminal.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn listen() -> io::Result<Self> {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let hangup = if is_ignored(&status) { None } else { Some(signal(SignalKind::hangup())?) };
        Ok(Self(hangup))
    }

    /// Waits for it.
    pub async fn recv(&mut self) {
        match &mut self.0 {
            Some(signal) => {
                signal.recv().await;
            }
            None => std::future::pending().await,
        }
    }
}

/// Whether SIGHUP, which is signal 1, is in the mask of ignored signals in /proc/PID/status.
fn is_ignored(status: &str) -> bool {
    let mask = status.lines().find_map(|l| l.strip_prefix("SigIgn:"));
    mask.and_then(|m| u64::from_str_radix(m.trim(), 16).ok()).is_some_and(|m| m & 1 == 1)
}

/// Goes up to the first of the lines and clears from there. A terminal that has become narrower since has wrapped them.
fn erase(lines: &[String], columns: usize) -> String {
    let rows: usize = lines.iter().map(|l| measure_text_width(l).div_ceil(columns.max(1)).max(1)).sum();
    if rows == 0 { String::new() } else { format!("\r\x1b[{rows}A\x1b[J") }
}

fn drawn(lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!("{NO_WRAP}{}\n{WRAP}", lines.join("\n")) }
}

/// The whole of stdout's terminal, given back as it was when dropped.
#[derive(Debug)]
pub struct Whole(());

impl Whole {
    /// Takes it: another screen than the one with what was said before, and no cursor.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn take() -> io::Result<Self> {
        say("\x1b[?1049h\x1b[?25l\x1b[?7l\x1b[2J")?;
        Ok(Self(()))
    }

    /// Shows these lines, in one write, over those that were there: nothing is ever blank between.
    ///
    /// # Errors
    /// Whatever the system says.
    pub fn show(&self, lines: &[String]) -> io::Result<()> {
        let (rows, _) = size();
        let shown: Vec<&str> = lines.iter().take(rows.saturating_sub(1)).map(String::as_str).collect();
        // Cleared before it is written: behind a full line the cursor still stands on its last letter.
        say(&format!("\x1b[H\x1b[K{}\r\n\x1b[J", shown.join("\r\n\x1b[K")))
    }
}

impl Drop for Whole {
    fn drop(&mut self) {
        let _ = say("\x1b[?7h\x1b[?25h\x1b[?1049l");
    }
}

fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nohup_is_seen_in_the_mask_of_ignored_signals() {
        assert!(is_ignored("SigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\n"));
        assert!(!is_ignored("SigBlk:\t0000000000000001\nSigIgn:\t0000000000001000\n"));
        assert!(!is_ignored(""));
    }

    #[test]
    fn lines_that_a_narrower_terminal_has_wrapped_are_erased_whole() {
        let lines = ["\x1b[1mfour\x1b[0m".to_owned(), "x".repeat(100), String::new()];
        assert_eq!(erase(&lines, 100), "\r\x1b[3A\x1b[J");
        assert_eq!(erase(&lines, 40), "\r\x1b[5A\x1b[J");
        assert_eq!(erase(&[], 40), "");
    }
}
