//! The command line: one file per subcommand. stdout is data, stderr is progress.

mod access;
mod check;
mod config;
mod control;
mod demo;
mod export;
mod generate;
mod plan;
mod quarantine;
#[cfg(test)]
mod reference;
mod report;
mod rollback;
mod run;
mod service_manager;
mod status;
mod tune;
mod uninstall;
mod verify;
mod view;
mod watch;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::error::{Error, Kind, Result};
use crate::job::{self, JobSpec};
use crate::pg::connect::{Connector, Session};
use crate::settings::Settings;

const EXIT_CODES: &str = "Exit codes:
  0  done
  1  it failed: the work, the server, or the result is not what it must be
  2  wrong command line, settings or job file
  3  check found something that stops a run
  4  the database cannot be reached or refuses us
  5  the state of the job or the database does not allow it
  6  another instance holds the lease
130  ended by a second signal, or asked to stop before it was done

Settings come from --config, then BACKFILLD_* variables (BACKFILLD_DATABASE__URL and so on), then flags; docs/settings.md
lists them.";

/// Fills a column of a live PostgreSQL table in batches, proves the result, switches schema and policies over, and can undo
/// it all.
#[derive(Parser)]
#[command(name = "backfilld", version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// Options of every command.
#[derive(Args)]
struct Global {
    /// Settings file (TOML)
    #[arg(long, global = true, env = "BACKFILLD_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// One setting, for example --set database.host=db1; not for secrets, which other users could see
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = key_value)]
    set: Vec<(String, String)>,
    /// Log format: auto, text or json
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<String>,
    /// What to log, for example info or backfilld=debug
    #[arg(long, global = true, value_name = "FILTER")]
    log_level: Option<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Look whether a job can run, without changing anything
    Check(check::CheckArgs),
    /// Show every statement of every phase, with its lock and its reason
    Plan(plan::PlanArgs),
    /// Run a job: the daemon
    Run(run::RunArgs),
    /// Show how far jobs are
    Status(status::StatusArgs),
    /// Stop a running job after the batch in flight
    Pause(control::PauseArgs),
    /// Let a paused or failed job go on
    Resume(control::JobArg),
    /// Release the hold point at which a job stands
    Cutover(control::JobArg),
    /// Change the pace or a limit of a running job, or show them
    Tune(tune::TuneArgs),
    /// Stop a job's batches for a while
    Throttle(tune::ThrottleArgs),
    /// Print the statements that let a role watch and control jobs
    Grants(tune::GrantsArgs),
    /// Compare every row with its source, without changing anything
    Verify(verify::VerifyArgs),
    /// Rows that could not be updated: list them, try them again, or let them stay
    #[command(subcommand)]
    Quarantine(quarantine::QuarantineCommand),
    /// Write what a job did, with charts, proofs and plans, as one file
    Report(report::ReportArgs),
    /// Undo a job: policies, functions, constraints, index, triggers
    Rollback(rollback::RollbackArgs),
    /// Forget a job that is rolled back or done
    Uninstall(uninstall::UninstallArgs),
    /// Write the job's final schema as an ordinary migration with its way back
    Export(export::ExportArgs),
    /// Watch it: a throwaway server, live traffic, the shipped job
    Demo(demo::DemoArgs),
    /// Look at the settings
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Print a script that completes commands and options in a shell
    Completions(generate::CompletionsArgs),
    /// Print the man page, or write one per command
    Man(generate::ManArgs),
}

/// The command line as clap knows it: for what is made from it, and for tests.
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// Parses the command line, runs the command, and turns its result into output and an exit code.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    // What is wrong with the settings themselves has to be said before they are known.
    let format = cli.global.log_format.clone().or_else(|| std::env::var("BACKFILLD_LOG__FORMAT").ok());
    let wants_json = format.is_some_and(|f| f == "json");
    let result = match runtime(&cli.command) {
        Ok(runtime) => runtime.block_on(async {
            let result = dispatch(cli).await;
            // On a thread of its own: it waits for an answer that this one has to receive.
            let _ = tokio::task::spawn_blocking(crate::telemetry::flush).await;
            result
        }),
        Err(e) => Err(Error::internal("cannot start the runtime").with_source(e)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            let json = wants_json || crate::telemetry::is_json();
            let text = if json { crate::telemetry::error_line(&e) } else { e.render() };
            // A closed stderr is no reason to fail differently.
            let _ = writeln!(std::io::stderr(), "{text}");
            ExitCode::from(e.kind().exit_code())
        }
    }
}

/// The daemon waits for the server nearly all the time, and a short batch hands on a dozen messages between its
/// tasks: on one thread that costs it half the CPU time that it does on three, which wake each other for each of them. Nothing in
/// it may compute for long, or the heartbeat would wait.
fn runtime(command: &Command) -> std::io::Result<tokio::runtime::Runtime> {
    let mut builder = match command {
        Command::Run(_) => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    builder.worker_threads(2).enable_all().build()
}

async fn dispatch(cli: Cli) -> Result<()> {
    let global = &cli.global;
    match cli.command {
        Command::Check(args) => check::run(global, args).await,
        Command::Plan(args) => plan::run(global, args).await,
        Command::Run(args) => run::run(global, args).await,
        Command::Status(args) => status::run(global, args).await,
        Command::Pause(args) => control::pause(global, args).await,
        Command::Resume(args) => control::resume(global, args).await,
        Command::Cutover(args) => control::cutover(global, args).await,
        Command::Tune(args) => tune::tune(global, args).await,
        Command::Throttle(args) => tune::throttle(global, args).await,
        Command::Grants(args) => tune::grants(&args),
        Command::Verify(args) => verify::run(global, args).await,
        Command::Quarantine(command) => quarantine::run(global, command).await,
        Command::Report(args) => report::run(global, args).await,
        Command::Rollback(args) => rollback::run(global, args).await,
        Command::Uninstall(args) => uninstall::run(global, args).await,
        Command::Export(args) => export::run(global, args).await,
        Command::Demo(args) => demo::run(global, args).await,
        Command::Config(command) => config::run(global, command),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
    }
}

fn key_value(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

impl Global {
    /// The settings, and logging set up from them. `quiet`: only warnings unless the operator asked for more.
    fn settings(&self, quiet: bool) -> Result<Settings> {
        self.settings_for(quiet, None)
    }

    /// The same for a process that runs a job.
    fn settings_for(&self, quiet: bool, job: Option<&str>) -> Result<Settings> {
        let settings = self.load(quiet)?;
        crate::telemetry::init(&settings, std::io::stderr().is_terminal(), job)?;
        Ok(settings)
    }

    fn load(&self, quiet: bool) -> Result<Settings> {
        let mut flags = Vec::new();
        if quiet && self.log_level.is_none() && std::env::var_os("BACKFILLD_LOG__LEVEL").is_none() {
            flags.push(("log.level".to_owned(), "warn".to_owned()));
        }
        for (key, value) in &self.set {
            crate::settings::refuse_secret(key, value)?;
            flags.push((key.clone(), value.clone()));
        }
        flags.extend(self.log_format.iter().map(|v| ("log.format".to_owned(), v.clone())));
        flags.extend(self.log_level.iter().map(|v| ("log.level".to_owned(), v.clone())));
        Settings::load(self.config.as_deref(), flags)
    }
}

/// One connection for a command that only needs one.
async fn connect(settings: &Settings, purpose: &str) -> Result<Session> {
    Connector::new(&settings.database)?.connect(purpose).await
}

/// The name of a job, given its name or its directory.
fn job_name(given: &str) -> Result<String> {
    let path = Path::new(given);
    if path.join("job.toml").exists() || given.ends_with(".toml") {
        return Ok(job::load(path)?.name);
    }
    Ok(given.to_owned())
}

/// The job as it was started, from the ledger.
fn started_spec(row: &crate::ledger::job::JobRow) -> Result<JobSpec> {
    serde_json::from_value(row.spec.clone())
        .map_err(|e| Error::internal(format!("job {} in the ledger cannot be read", row.name)).with_source(e))
}

/// Writes data to stdout. A reader that went away (`| head`) is no error.
fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.write_all(b"\n")).and_then(|()| out.flush()) {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::internal("cannot write to stdout").with_source(e))
        }
        _ => Ok(()),
    }
}

/// JSON for machines, indented.
fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::internal("cannot write JSON").with_source(e))?;
    print(&text)
}

/// Asks before something that cannot be taken back. `yes`: the operator said so already.
fn confirm(question: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() {
        return Err(Error::new(Kind::Input, format!("{question}: not asked, since there is no terminal"))
            .with_hint("say --yes"));
    }
    let _ = write!(std::io::stderr(), "{question} [y/N] ");
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer).map_err(|e| Error::internal("cannot read the answer").with_source(e))?;
    if matches!(answer.trim(), "y" | "Y" | "yes") {
        Ok(())
    } else {
        Err(Error::refused("not confirmed; nothing was done"))
    }
}

/// Width of the terminal for tables; 80 where there is none.
fn width() -> usize {
    std::env::var("COLUMNS").ok().and_then(|c| c.parse().ok()).filter(|w| *w >= 40).unwrap_or(80)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn secrets_are_refused_as_arguments() {
        let refused = |text: &str| {
            let (key, value) = key_value(text).expect("well-formed");
            crate::settings::refuse_secret(&key, &value).err().map(|e| e.render())
        };
        for text in [
            "database.password=s3cret",
            "http.token=s3cret",
            "hooks.webhook_secret=s3cret",
            "hooks.webhook=https://h/s3cret",
            "database.url=postgresql://u:s3cret@h/db",
            "database.url=postgresql://h/db?user=u&password=s3cret",
            "database.url=host=h user=u password=s3cret",
            "database.url=host=h password=s3cret what",
        ] {
            let said = refused(text).unwrap_or_default();
            assert!(
                said.contains(text.split('=').next().unwrap_or_default()) && !said.contains("s3cret"),
                "{text}: {said}"
            );
        }
        for text in [
            "http.token_file=/x",
            "database.url=postgresql://u@h:5432/db",
            "database.url=host=h user=u",
            "lease.ttl=3s",
        ] {
            assert_eq!(refused(text), None);
        }
    }
}
