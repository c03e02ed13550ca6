//! Tells others what happened to a job: a program of the operator's, and a webhook.
//!
//! A task of its own reads the job's events from the ledger, once a second; another one delivers. So nothing here can hold
//! up the backfill, and whoever wrote an event, an operator on another machine too, is told of. What to run and whom to ask
//! is in the daemon's settings only: whoever may write the ledger could otherwise run programs as the daemon.

mod command;
mod webhook;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

pub use self::webhook::Webhook;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::ledger::{checkpoint, event, job as jobs};
use crate::settings::HookSettings;

/// How often the events are read.
const POLL: Duration = Duration::from_secs(1);
/// Notifications that may wait for a slow receiver; more are dropped, and told in the log.
const QUEUE: usize = 256;
/// Events are numbered before they commit, so one that committed late can have a lower number than others that were read.
const LOOK_BACK: i64 = 100;
/// How long a daemon that leaves waits until everything is delivered.
pub const LEAVE: Duration = Duration::from_secs(15);

/// What is told. Names and numbers, no row values.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Notification {
    /// `phase`, `held`, `paused`, `critical`, `failed`, `done`, `rolled_back`, `throttled`, `quarantined`.
    pub event: String,
    /// The job.
    pub job: String,
    /// Where it is.
    pub phase: String,
    /// Whether it moves.
    pub status: String,
    /// Why, in a few words; empty if there is nothing to say.
    pub reason: String,
    /// What to do about it; empty if nothing.
    pub hint: String,
    /// When it happened, by the database's clock, as text.
    pub at: String,
    /// The daemon that tells it.
    pub instance: String,
}

/// The running tasks.
pub struct Hooks {
    stop: CancellationToken,
    tasks: Option<[JoinHandle<()>; 2]>,
}

impl Hooks {
    /// Starts them, if the settings want any. What happens from now on is told.
    ///
    /// # Errors
    /// Database errors.
    pub async fn start(ctx: &Context, webhook: Option<Webhook>) -> Result<Self> {
        let stop = CancellationToken::new();
        let settings = ctx.settings.hooks.clone();
        if settings.command.is_none() && webhook.is_none() {
            return Ok(Self { stop, tasks: None });
        }
        let client = ctx.client().await?;
        let seen = Seen {
            start: event::newest(&**client, ctx.job()).await?,
            ids: BTreeSet::new(),
            quarantined: checkpoint::quarantined(&**client, ctx.job()).await?,
            throttled: None,
        };
        drop(client);
        let (send, receive) = mpsc::channel(QUEUE);
        let tasks = [
            tokio::spawn(read(ctx.clone(), stop.clone(), seen, send)),
            tokio::spawn(deliver(settings, webhook, receive)),
        ];
        Ok(Self { stop, tasks: Some(tasks) })
    }

    /// Tells what is still untold, for a while.
    pub async fn finish(mut self) {
        self.stop.cancel();
        let Some([mut reader, mut deliverer]) = self.tasks.take() else { return };
        let both = async {
            let _ = (&mut reader).await;
            let _ = (&mut deliverer).await;
        };
        if tokio::time::timeout(LEAVE, both).await.is_err() {
            warn!("notifications that could not be delivered in time are dropped");
            reader.abort();
            deliverer.abort();
        }
    }
}

/// What must be so before a daemon starts: the program can be run, the webhook asked. Gives the webhook.
///
/// # Errors
/// Input errors that name the key.
pub fn check(settings: &HookSettings) -> Result<Option<Webhook>> {
    if let Some(program) = &settings.command {
        let runs = std::fs::metadata(program).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0);
        if !runs {
            return Err(Error::input(format!("`hooks.command`: cannot run {}", program.display()))
                .with_hint("it has to be there, and executable for the daemon's user"));
        }
    }
    Webhook::new(settings)
}

/// What was read so far.
struct Seen {
    /// Events up to here were there before.
    start: i64,
    ids: BTreeSet<i64>,
    quarantined: i64,
    /// Since when batches have waited, why, and whether that was told.
    throttled: Option<(Instant, String, String, bool)>,
}

async fn read(ctx: Context, stop: CancellationToken, mut seen: Seen, send: mpsc::Sender<Notification>) {
    loop {
        let last = stop.is_cancelled();
        match look(&ctx, &mut seen).await {
            Ok(found) => {
                for one in found {
                    if send.try_send(one).is_err() {
                        warn!(job = ctx.job(), "a notification is dropped, too many are waiting");
                    }
                }
            }
            Err(e) => warn!(job = ctx.job(), sqlstate = e.sqlstate(), "the events cannot be read: {e}"),
        }
        if last {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(POLL) => {}
            () = stop.cancelled() => {}
        }
    }
}

async fn look(ctx: &Context, seen: &mut Seen) -> Result<Vec<Notification>> {
    let client = ctx.client().await?;
    let client = &**client;
    let from = seen.ids.last().map_or(seen.start, |last| seen.start.max(last - LOOK_BACK));
    let events = event::after(client, ctx.job(), from).await?;
    let job = jobs::get(client, ctx.job()).await?;
    let say = |event: &str, reason: String, at: String| Notification {
        event: event.to_owned(),
        job: job.name.clone(),
        phase: job.phase.to_string(),
        status: job.status.to_string(),
        reason,
        hint: job.hint.clone(),
        at,
        instance: ctx.settings.instance.clone(),
    };
    let mut out = Vec::new();
    for (id, e) in events {
        if !seen.ids.insert(id) {
            continue;
        }
        if e.kind == "throttle" && e.detail.get("wait").is_some() {
            let waits = e.detail["wait"].as_bool().unwrap_or(false);
            let since = seen.throttled.take().map_or((Instant::now(), false), |(since, .., told)| (since, told));
            seen.throttled = waits.then(|| (since.0, text(&e.detail, "reason"), e.at.clone(), since.1));
        } else if let Some((event, reason)) = worth_telling(&e.kind, &e.detail) {
            out.push(say(event, reason, e.at));
        }
    }
    seen.ids = seen.ids.iter().copied().rev().take(2 * LOOK_BACK as usize).collect();
    if let Some((since, reason, at, told)) = &mut seen.throttled
        && !*told
        && since.elapsed() >= ctx.settings.hooks.throttled_after
    {
        *told = true;
        out.push(say("throttled", reason.clone(), at.clone()));
    }
    let quarantined = checkpoint::quarantined(client, ctx.job()).await?;
    if quarantined > seen.quarantined {
        out.push(say("quarantined", format!("{quarantined} rows cannot be updated"), String::new()));
    }
    seen.quarantined = quarantined;
    Ok(out)
}

fn text(detail: &Value, key: &str) -> String {
    detail[key].as_str().unwrap_or_default().to_owned()
}

/// The name under which an event of the ledger is told, and why it happened; `None`: it is not.
fn worth_telling(kind: &str, detail: &Value) -> Option<(&'static str, String)> {
    match kind {
        "phase" => Some(("phase", format!("{} is complete, {} is next", text(detail, "phase"), text(detail, "next")))),
        "held" => Some(("held", format!("hold point before {}", text(detail, "before")))),
        "pause" => Some(("paused", text(detail, "reason"))),
        "critical" => Some(("critical", text(detail, "reason"))),
        "failed" | "rollback failed" => Some(("failed", text(detail, "reason"))),
        "done" => Some(("done", String::new())),
        "rolled_back" => Some(("rolled_back", String::new())),
        _ => None,
    }
}

/// Delivers one after the other, so that a receiver sees them in order.
async fn deliver(settings: HookSettings, webhook: Option<Webhook>, mut receive: mpsc::Receiver<Notification>) {
    while let Some(one) = receive.recv().await {
        let run = async {
            let Some(program) = &settings.command else { return };
            match command::run(program, settings.timeout, &one).await {
                Ok(output) => info!(job = one.job, event = one.event, output, "hook: the command has ended"),
                Err(e) => warn!(job = one.job, event = one.event, "hook: {e}"),
            }
        };
        let post = async {
            let Some(webhook) = &webhook else { return };
            match webhook.deliver(&one).await {
                Ok(()) => info!(job = one.job, event = one.event, "hook: the webhook has it"),
                Err(e) => warn!(job = one.job, event = one.event, "hook: given up: {}", e.line()),
            }
        };
        tokio::join!(run, post);
    }
}
