//! `backfilld config`: look at the settings, with secrets redacted.

use super::Global;
use crate::error::Result;
use crate::pg::connect::Connector;

/// Subcommands.
#[derive(clap::Subcommand)]
pub enum ConfigCommand {
    /// Load and validate the settings; connects nowhere
    Check,
    /// Print the effective settings as TOML, with where each comes from
    Show,
    /// Print an example settings file with every key and its default
    Example,
    /// Print the JSON Schema of job.toml
    JobSchema,
}

pub fn run(global: &Global, command: ConfigCommand) -> Result<()> {
    match command {
        ConfigCommand::Check => {
            let settings = global.load(false)?;
            Connector::new(&settings.database)?;
            super::print("settings are valid")
        }
        ConfigCommand::Show => super::print(global.load(false)?.show().trim_end()),
        ConfigCommand::Example => super::print(crate::settings::example().trim_end()),
        ConfigCommand::JobSchema => super::print_json(&crate::job::spec::json_schema()),
    }
}
