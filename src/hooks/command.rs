//! Runs the operator's program for one notification.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

use super::Notification;
use crate::error::{Error, Result};

/// Output that is kept for the log, per stream: a few lines that say what went wrong.
const KEPT: usize = 1024;

/// Runs it without a shell and without the daemon's environment, in which there may be a password; kills it when its time is
/// over. Gives what it wrote, cut.
///
/// # Errors
/// It cannot be started, ends with a code other than 0, or is not done in time.
pub(super) async fn run(program: &Path, timeout: Duration, what: &Notification) -> Result<String> {
    let mut command = Command::new(program);
    command.env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    for name in ["PATH", "HOME", "LANG", "TZ"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    for (name, value) in [
        ("EVENT", &what.event),
        ("JOB", &what.job),
        ("PHASE", &what.phase),
        ("STATUS", &what.status),
        ("REASON", &what.reason),
        ("HINT", &what.hint),
        ("AT", &what.at),
        ("INSTANCE", &what.instance),
    ] {
        // A NUL cannot be in the environment of a program.
        command.env(format!("BACKFILLD_{name}"), value.replace('\0', " "));
    }
    let failed = |what: &str| Error::failed(format!("{}: {what}", program.display()));
    let mut child = command.spawn().map_err(|e| failed("cannot be started").with_source(e))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let all = async { tokio::join!(child.wait(), head(out), head(err)) };
    let (status, out, err) = match tokio::time::timeout(timeout, all).await {
        Ok(ended) => ended,
        Err(_) => {
            let _ = child.start_kill();
            let _ = child.wait().await;
            return Err(failed(&format!("killed, it was not done within {} s", timeout.as_secs())));
        }
    };
    let output = [out, err].join(" ").trim().to_owned();
    match status {
        Ok(status) if status.success() => Ok(output),
        Ok(status) => Err(failed(&format!("{status}; it wrote: {output}"))),
        Err(e) => Err(failed("cannot be waited for").with_source(e)),
    }
}

/// The beginning of what comes, on one line; the rest is read and dropped, so that the writer does not stand still.
async fn head(stream: Option<impl AsyncRead + Unpin>) -> String {
    let Some(mut stream) = stream else { return String::new() };
    let (mut kept, mut chunk) = (Vec::new(), [0u8; 4096]);
    while let Ok(n @ 1..) = stream.read(&mut chunk).await {
        kept.extend(chunk.iter().take(n.min(KEPT - kept.len())));
    }
    String::from_utf8_lossy(&kept).replace(char::is_control, " ")
}
