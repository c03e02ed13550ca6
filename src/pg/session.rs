//! A session: a connection with the task that drives it, and what cancels its statement.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_postgres::{AsyncMessage, CancelToken, Client, Socket, tls};
use tokio_postgres_rustls::MakeRustlsConnect;
use tokio_util::sync::CancellationToken;

use crate::error::{Error, Kind, Result};

/// How long a dropped session may take to say goodbye before its socket is closed anyway.
const GOODBYE: Duration = Duration::from_secs(1);

/// A connection and the task that drives it. Dropping the session ends both.
pub struct Session {
    /// The connection's client.
    pub client: Client,
    /// Process id of the server's backend.
    pub pid: i32,
    /// When that backend started, as text in UTC that casts to `timestamptz`; with the pid it names the backend.
    pub backend_start: String,
    /// For example 150018.
    pub server_version_num: u32,
    driver: Driver,
    closed: CancellationToken,
    /// Rung by each notification that comes from the server.
    bell: Arc<Notify>,
    canceller: Canceller,
}

/// Ends the connection's task. Dropped after the client, so the task is about to say goodbye by itself.
pub(super) struct Driver(Option<JoinHandle<()>>);

/// Cancels what a session is doing; independent of borrows of the session.
#[derive(Clone)]
pub struct Canceller {
    token: CancelToken,
    tls: MakeRustlsConnect,
    timeout: Duration,
    place: String,
}

impl Session {
    /// On a connection that nobody has asked anything yet. `place` is for messages.
    pub(super) fn new<T>(
        client: Client,
        connection: tokio_postgres::Connection<Socket, T>,
        tls: MakeRustlsConnect,
        timeout: Duration,
        place: String,
    ) -> Self
    where
        T: tls::TlsStream + Unpin + Send + 'static,
    {
        let (closed, bell) = (CancellationToken::new(), Arc::new(Notify::new()));
        let driver = Driver::start(connection, closed.clone(), Arc::clone(&bell));
        let canceller = Canceller { token: client.cancel_token(), tls, timeout, place };
        Self { client, pid: 0, backend_start: String::new(), server_version_num: 0, driver, closed, bell, canceller }
    }

    /// The bare token; [`Session::canceller`] brings the right TLS with it.
    pub fn cancel_token(&self) -> CancelToken {
        self.canceller.token.clone()
    }

    /// Something that cancels this session's statement while a transaction borrows the session.
    pub fn canceller(&self) -> Canceller {
        self.canceller.clone()
    }

    /// Asks the server to cancel what the session is doing. The statement then fails with 57014, unless it was faster.
    ///
    /// # Errors
    /// As [`Canceller::cancel`].
    pub async fn cancel(&self) -> Result<()> {
        self.canceller.cancel().await
    }

    /// Resolves when the connection has ended, whoever ended it.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.closed.is_cancelled() || self.client.is_closed()
    }

    /// Resolves when the server has sent a notification (LISTEN) since this was asked last.
    pub async fn notified(&self) {
        self.bell.notified().await;
    }

    /// Says goodbye to the server and waits until the connection is closed, at most one second.
    pub async fn close(self) {
        let closed = self.closed.clone();
        drop(self);
        // Not an error: `drop` closes the socket then.
        let _ = tokio::time::timeout(GOODBYE, closed.cancelled()).await;
    }

    /// The client and its task, for a pool that owns both.
    pub(super) fn into_parts(mut self) -> (Client, JoinHandle<()>) {
        let task = self.driver.0.take().unwrap_or_else(|| tokio::spawn(async {}));
        (self.client, task)
    }
}

impl Canceller {
    /// Asks the server to cancel what the session is doing.
    ///
    /// # Errors
    /// [`Kind::Connect`] if the request could not be sent. That it was sent does not say that something was cancelled.
    pub async fn cancel(&self) -> Result<()> {
        let sent = tokio::time::timeout(self.timeout, self.token.cancel_query(self.tls.clone())).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) => {
                Err(Error::new(Kind::Connect, format!("cannot send a cancel request to {}", self.place)).with_source(e))
            }
            Err(_) => Err(Error::new(Kind::Connect, format!("a cancel request to {} timed out", self.place))),
        }
    }
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session(backend {} on {})", self.pid, self.canceller.place)
    }
}

impl Driver {
    /// Cancels `closed` when the connection has ended, and rings `bell` for each notification.
    pub(super) fn start<T>(
        connection: tokio_postgres::Connection<Socket, T>,
        closed: CancellationToken,
        bell: Arc<Notify>,
    ) -> Self
    where
        T: tls::TlsStream + Unpin + Send + 'static,
    {
        Self(Some(tokio::spawn(drive(connection, closed, bell))))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let Some(mut task) = self.0.take().filter(|t| !t.is_finished()) else { return };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    if tokio::time::timeout(GOODBYE, &mut task).await.is_err() {
                        task.abort();
                    }
                });
            }
            Err(_) => task.abort(),
        }
    }
}

/// Runs the connection until it ends, and passes the server's notices on. Their text can hold row values.
async fn drive<T>(mut connection: tokio_postgres::Connection<Socket, T>, closed: CancellationToken, bell: Arc<Notify>)
where
    T: tls::TlsStream + Unpin,
{
    let _closed = closed.drop_guard();
    let mut messages = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
    while let Some(message) = messages.next().await {
        match message {
            Ok(AsyncMessage::Notice(n)) => {
                tracing::debug!(severity = n.severity(), sqlstate = n.code().code(), "notice from the server");
                tracing::trace!(sqlstate = n.code().code(), text = n.message(), "text of the notice");
            }
            Ok(AsyncMessage::Notification(_)) => bell.notify_one(),
            Ok(_) => {}
            Err(e) => {
                let sqlstate = e.code().map(|c| c.code().to_owned());
                tracing::debug!(error = %Error::from(e), sqlstate, "connection ended");
                return;
            }
        }
    }
}
