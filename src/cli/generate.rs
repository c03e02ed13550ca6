//! Shell completions and man pages, made from the command line itself.

use std::path::{Path, PathBuf};

use clap_complete::Shell;

use crate::error::{Error, Result};

/// Options.
#[derive(clap::Args)]
pub struct CompletionsArgs {
    /// For which shell, for example: source <(backfilld completions bash)
    shell: Shell,
}

/// Options.
#[derive(clap::Args)]
pub struct ManArgs {
    /// One page per command, into this directory; without it, the first page to stdout
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub fn completions(args: &CompletionsArgs) -> Result<()> {
    super::print(script(args.shell)?.trim_end())
}

pub fn man(args: &ManArgs) -> Result<()> {
    if let Some(dir) = &args.dir {
        return pages(dir)
            .map_err(|e| Error::input(format!("--dir: cannot write pages to {}", dir.display())).with_source(e));
    }
    let mut page = Vec::new();
    clap_mangen::Man::new(super::command())
        .render(&mut page)
        .map_err(|e| Error::internal("cannot make the page").with_source(e))?;
    super::print(String::from_utf8_lossy(&page).trim_end())
}

fn script(shell: Shell) -> Result<String> {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "backfilld", &mut out);
    String::from_utf8(out).map_err(|e| Error::internal("completions are not UTF-8").with_source(e))
}

fn pages(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    // The pages of `help` would say what every page says.
    clap_mangen::generate_to(super::command().disable_help_subcommand(true), dir)
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum as _;

    use super::*;

    /// What bash would offer after these words.
    fn offered(words: &[&str]) -> Vec<String> {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("backfilld");
        std::fs::write(&file, script(Shell::Bash).expect("a script")).expect("it is written");
        let program = "set -e; file=$1; shift; source \"$file\"; complete -p backfilld >/dev/null
            COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1))
            _backfilld backfilld \"${COMP_WORDS[COMP_CWORD]}\" \"${COMP_WORDS[COMP_CWORD-1]}\"
            printf '%s\\n' \"${COMPREPLY[@]}\"";
        let out = std::process::Command::new("bash")
            .args(["--norc", "-c", program, "bash"])
            .arg(&file)
            .args(words)
            .output()
            .expect("bash runs");
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).expect("words").lines().map(str::to_owned).collect()
    }

    #[test]
    fn bash_loads_its_script_and_offers_commands_and_options() {
        assert_eq!(offered(&["backfilld", "stat"]), ["status"]);
        assert_eq!(offered(&["backfilld", "quarantine", "acc"]), ["accept"]);
        assert_eq!(offered(&["backfilld", "status", "--wa"]), ["--watch"]);
    }

    #[test]
    fn every_shell_has_a_script_that_knows_the_commands() {
        for shell in Shell::value_variants() {
            let script = script(*shell).expect("a script");
            assert!(script.contains("cutover") && script.contains("quarantine"), "{shell}");
        }
    }

    #[test]
    fn every_command_has_a_page_and_the_first_page_has_every_command() {
        let dir = tempfile::tempdir().expect("a directory");
        pages(dir.path()).expect("pages");
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap_or_default();
        let first = read("backfilld.1");
        assert!(first.contains("Exit codes"), "{first}");
        for command in super::super::command().get_subcommands().filter(|c| c.get_name() != "help") {
            let (name, about) =
                (command.get_name(), command.get_about().expect("each command says what it is for").to_string());
            assert!(first.contains(&format!("backfilld\\-{name}(1)")), "{name}");
            let page = read(&format!("backfilld-{name}.1"));
            assert!(
                page.contains(".TH") && page.contains(about.split([',', '-', ':', '\'']).next().expect("some text")),
                "{page}"
            );
        }
        assert!(read("backfilld-quarantine-accept.1").contains("why"), "pages of commands below commands");
        assert!(!dir.path().join("backfilld-help.1").exists());
    }
}
