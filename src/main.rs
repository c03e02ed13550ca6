//! The `backfilld` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    backfilld::cli::main()
}
