//! What systemd is told, by the protocol of sd_notify(3): that we are ready, what is happening, that the event loop turns,
//! that we are leaving. One datagram each; nothing is said where nobody asks (`NOTIFY_SOCKET` is not set).

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::http::Pulse;
use crate::progress::{Progress, Snapshot};

/// How often the status is looked at; often enough for `systemctl status`, and it costs nothing.
const LOOK: Duration = Duration::from_secs(1);
/// Signs of life per watchdog interval. systemd advises two; the third is for a machine that is busy.
const SIGNS_PER_INTERVAL: u32 = 3;

/// The service manager that started this process.
pub(super) struct ServiceManager {
    socket: UnixDatagram,
    /// It ends and restarts us when it hears nothing for so long.
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// The one of this process, if there is one that listens.
    pub(super) fn of_this_process() -> Option<Self> {
        Self::new(|name| std::env::var_os(name))
    }

    fn new(variable: impl Fn(&str) -> Option<OsString>) -> Option<Self> {
        let address = variable("NOTIFY_SOCKET").filter(|a| !a.is_empty())?;
        let socket = connect(&address)
            .inspect_err(|e| tracing::warn!(error = %e, "the service manager's NOTIFY_SOCKET cannot be used"))
            .ok()?;
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        // The variables are inherited; the process id says whom they are for.
        let for_us = variable("WATCHDOG_PID").is_none() || number("WATCHDOG_PID") == Some(std::process::id().into());
        let watchdog = number("WATCHDOG_USEC").filter(|us| for_us && *us > 0).map(Duration::from_micros);
        Some(Self { socket, watchdog })
    }

    /// Tells it what `progress` says, until dropped. A watchdog gets its sign of life only while `pulse` beats, so that a
    /// process whose event loop hangs is restarted.
    pub(super) async fn tell(self, pulse: Pulse, progress: Progress, leaving: CancellationToken) {
        let every = self.watchdog.map_or(LOOK, |w| LOOK.min(w / SIGNS_PER_INTERVAL));
        let mut changes = progress.watch();
        let (mut ready, mut told_leaving, mut last) = (false, false, String::new());
        loop {
            let now = changes.borrow_and_update().clone();
            if now.entered && !ready {
                self.send("READY=1");
                ready = true;
            }
            if leaving.is_cancelled() && !told_leaving {
                self.send("STOPPING=1");
                told_leaving = true;
            }
            let status = if told_leaving { "stopping after the batch in flight".to_owned() } else { line(&now) };
            if status != last {
                self.send(&format!("STATUS={status}"));
                last = status;
            }
            if self.watchdog.is_some() && pulse.stale().is_none() {
                self.send("WATCHDOG=1");
            }
            tokio::select! {
                () = tokio::time::sleep(every) => {}
                Ok(()) = changes.changed(), if !ready => {}
                () = leaving.cancelled(), if !told_leaving => {}
            }
        }
    }

    fn send(&self, text: &str) {
        // A manager that does not listen now is no reason to stop; without signs of life it restarts us anyway.
        if let Err(e) = self.socket.send(text.as_bytes()) {
            tracing::debug!(error = %e, "the service manager does not listen");
        }
    }
}

/// A path, or a name in the abstract namespace that begins with `@`.
fn connect(address: &OsStr) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    // It never waits: a full queue loses a status, not a batch.
    socket.set_nonblocking(true)?;
    match address.as_bytes().strip_prefix(b"@") {
        #[cfg(target_os = "linux")]
        Some(name) => {
            use std::os::linux::net::SocketAddrExt as _;
            socket.connect_addr(&std::os::unix::net::SocketAddr::from_abstract_name(name)?)?;
        }
        #[cfg(not(target_os = "linux"))]
        Some(_) => return Err(io::ErrorKind::Unsupported.into()),
        None => socket.connect(Path::new(address))?,
    }
    Ok(socket)
}

/// One line for `systemctl status`.
fn line(now: &Snapshot) -> String {
    let mut out = if now.phase.is_empty() { "starting".to_owned() } else { now.phase.clone() };
    if now.phase == "backfill" && now.rows_estimate > 0 {
        let rows = now.rows_estimate.max(now.rows_scanned);
        out += &format!(": {} of {rows} rows, {:.0} rows/s", now.rows_scanned, now.rows_per_second);
    }
    if !now.note.is_empty() {
        out += &format!(" ({})", now.note);
    }
    out.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manager(socket: &Path, extra: &[(&str, &str)]) -> Option<ServiceManager> {
        ServiceManager::new(|name| match name {
            "NOTIFY_SOCKET" => Some(socket.as_os_str().to_owned()),
            _ => extra.iter().find(|(k, _)| *k == name).map(|(_, v)| OsString::from(*v)),
        })
    }

    async fn next(socket: &tokio::net::UnixDatagram) -> String {
        let mut buffer = [0; 4096];
        let n = socket.recv(&mut buffer).await.expect("a message");
        String::from_utf8_lossy(&buffer[..n]).into_owned()
    }

    #[tokio::test]
    async fn the_watchdog_is_fed_only_while_the_event_loop_turns() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let socket = tokio::net::UnixDatagram::bind(&path).expect("a socket");
        let manager = manager(&path, &[("WATCHDOG_USEC", "30000")]).expect("a manager");
        let (pulse, progress) = (Pulse::stopped_a_minute_ago(), Progress::default());
        let task = tokio::spawn(manager.tell(pulse.clone(), progress.clone(), CancellationToken::new()));
        assert_eq!(next(&socket).await, "STATUS=starting");
        for phase in ["preflight", "expand", "backfill"] {
            progress.update(|p| p.phase = phase.into());
            assert_eq!(next(&socket).await, format!("STATUS={phase}"), "neither ready nor alive");
        }
        progress.update(|p| {
            p.entered = true;
            p.phase = "standby".into();
            p.note = "db1 holds\nthe lease".into();
        });
        assert_eq!(next(&socket).await, "READY=1");
        assert_eq!(next(&socket).await, "STATUS=standby (db1 holds the lease)");
        pulse.beat();
        assert_eq!(next(&socket).await, "WATCHDOG=1");
        task.abort();
    }

    #[test]
    fn a_watchdog_of_another_process_is_not_ours() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("notify");
        let _socket = UnixDatagram::bind(&path).expect("a socket");
        let own = std::process::id().to_string();
        let usec = ("WATCHDOG_USEC", "3000000");
        assert_eq!(manager(&path, &[usec, ("WATCHDOG_PID", "1")]).expect("a manager").watchdog, None);
        assert!(manager(&path, &[usec, ("WATCHDOG_PID", &own)]).expect("a manager").watchdog.is_some());
        assert!(manager(&dir.path().join("nobody"), &[]).is_none());
        assert!(ServiceManager::new(|_| None).is_none());
    }
}
