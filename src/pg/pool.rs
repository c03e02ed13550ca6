//! A small pool for control work: heartbeats, status, throttle probes. Batches and DDL have sessions of their own, as
//! recycling keeps session settings.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};

use deadpool_postgres::{Connect, Manager, ManagerConfig, Object, PoolError, RecyclingMethod, Runtime, TimeoutType};
use tokio::task::JoinHandle;
use tokio_postgres::{Client, Config};

use super::connect::Connector;
use crate::error::{Error, Kind, Result};
use crate::settings::DatabaseSettings;

/// Connections in use and at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolStatus {
    /// Open and not in use.
    pub idle: usize,
    /// Handed out.
    pub in_use: usize,
    /// Callers that wait for one.
    pub waiting: usize,
}

/// The pool. Cheap to clone.
#[derive(Clone)]
pub struct Pool {
    inner: deadpool_postgres::Pool,
    /// Why the last connection could not be opened; deadpool can only carry the driver's own errors.
    reason: Arc<Mutex<Option<Error>>>,
    timeout: std::time::Duration,
}

impl Pool {
    /// A pool of at most `settings.pool_size` sessions, opened when needed, with the connector's session settings.
    ///
    /// # Errors
    /// [`Kind::Internal`] if the pool cannot be built.
    pub fn new(connector: &Connector, settings: &DatabaseSettings, purpose: &str) -> Result<Self> {
        let reason = Arc::new(Mutex::new(None));
        let connect = Opener { connector: connector.clone(), purpose: purpose.to_owned(), reason: Arc::clone(&reason) };
        let manager = Manager::from_connect(
            Config::new(),
            connect,
            ManagerConfig {
                // No round trip to test a connection: a heartbeat that finds it dead asks for another one.
                recycling_method: RecyclingMethod::Fast,
            },
        );
        // The connector limits each host; with several hosts in turn the sum counts.
        let hosts = u32::try_from(connector.target().hosts.len()).unwrap_or(1);
        let timeout = connector.target().connect_timeout * hosts.max(1);
        let inner = deadpool_postgres::Pool::builder(manager)
            .max_size(settings.pool_size as usize)
            .runtime(Runtime::Tokio1)
            .wait_timeout(Some(timeout))
            .create_timeout(Some(timeout))
            .build()
            .map_err(|e| Error::internal("cannot build the connection pool").with_source(e))?;
        Ok(Self { inner, reason, timeout })
    }

    /// A connection; it goes back when dropped. Leave its session settings alone (SET LOCAL only), and take it out with
    /// `Object::take` after a query was dropped half way.
    ///
    /// # Errors
    /// [`Kind::Connect`] with the reason, also when every connection stays in use for too long.
    pub async fn get(&self) -> Result<Object> {
        let waited = humantime::format_duration(self.timeout);
        self.inner.get().await.map_err(|e| match e {
            PoolError::Backend(e) => self.take_reason().unwrap_or_else(|| e.into()),
            PoolError::Timeout(TimeoutType::Wait) => {
                Error::new(Kind::Connect, format!("no pooled connection became free within {waited}"))
                    .with_hint("raise database.pool_size, or look for what holds the connections")
            }
            PoolError::Timeout(_) => {
                Error::new(Kind::Connect, format!("no connection could be opened within {waited}"))
            }
            other => Error::internal("the connection pool failed").with_source(other),
        })
    }

    /// How many connections there are.
    pub fn status(&self) -> PoolStatus {
        let s = self.inner.status();
        PoolStatus { idle: s.available, in_use: s.size.saturating_sub(s.available), waiting: s.waiting }
    }

    /// Closes idle connections now and the others when they come back; `get` fails from here on.
    pub fn close(&self) {
        self.inner.close();
    }

    fn take_reason(&self) -> Option<Error> {
        self.reason.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Lets deadpool open connections the way everybody else does.
struct Opener {
    connector: Connector,
    purpose: String,
    reason: Arc<Mutex<Option<Error>>>,
}

type Opened<'a> = Pin<Box<dyn Future<Output = Result<(Client, JoinHandle<()>), tokio_postgres::Error>> + Send + 'a>>;

impl Connect for Opener {
    fn connect(&self, _: &Config) -> Opened<'_> {
        Box::pin(async move {
            match self.connector.connect(&self.purpose).await {
                Ok(session) => Ok(session.into_parts()),
                Err(e) => {
                    *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = Some(e);
                    Err(placeholder().await)
                }
            }
        })
    }
}

/// The driver's error has no public constructor; this one only says "look at `reason`".
async fn placeholder() -> tokio_postgres::Error {
    match Config::new().connect(tokio_postgres::NoTls).await {
        Err(e) => e,
        Ok(_) => unreachable!("a configuration without host connects to nothing"),
    }
}
