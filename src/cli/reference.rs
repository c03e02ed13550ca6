//! docs/cli.md: what `--help` says of each command, at 80 columns.

use std::fmt::Write as _;

use clap::CommandFactory as _;

use super::Cli;

fn reference_markdown() -> String {
    let mut out = String::from(
        "# Commands\n\n\
         What `backfilld --help` and `backfilld <command> --help` say. stdout is data, stderr is progress and errors.\n\
         `backfilld man` prints the same as a man page, `backfilld completions bash` (zsh, fish, elvish, powershell) a script for the\n\
         shell, to be put where it looks for such scripts or loaded by `source <(backfilld completions bash)`. The Debian package\n\
         brings both.\n\n\
         On a terminal, `run` and `status --watch` draw a live view; `NO_COLOR` keeps it plain, `TERM=dumb` and pipes make it lines.\n",
    );
    // What the environment of whoever makes this page holds is nobody's business.
    let command = Cli::command().term_width(80).mut_args(|a| a.hide_env_values(true));
    write_command(&mut out, "backfilld", command);
    out
}

fn write_command(out: &mut String, path: &str, command: clap::Command) {
    let mut command = command.bin_name(path).term_width(80).mut_args(|a| a.hide_env_values(true));
    // Propagates global options.
    command.build();
    let help = command.render_long_help().to_string();
    let text: Vec<&str> = help.trim_end().lines().map(str::trim_end).collect();
    let _ = writeln!(out, "\n## {path}\n\n```text\n{}\n```", text.join("\n"));
    for sub in command.get_subcommands().filter(|s| s.get_name() != "help") {
        write_command(out, &format!("{path} {}", sub.get_name()), sub.clone());
    }
}

#[test]
fn the_document_is_up_to_date_and_fits_eighty_columns() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cli.md");
    let made = reference_markdown();
    let wide: Vec<&str> =
        made.lines().skip_while(|l| !l.starts_with("## ")).filter(|l| l.chars().count() > 80).collect();
    assert!(wide.is_empty(), "{wide:?}");
    if std::env::var_os("BACKFILLD_TEST_BLESS").is_some() {
        std::fs::write(&path, &made).expect("docs/ can be written");
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(kept == made, "docs/cli.md is stale; run the test with BACKFILLD_TEST_BLESS=1");
}
