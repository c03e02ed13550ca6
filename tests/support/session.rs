//! Sessions whose statements can be interleaved, by waiting for conditions and never for time.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

/// Far beyond what any condition takes on a busy machine; a test that gets there has failed.
pub(super) const DEADLINE: Duration = Duration::from_secs(30);

/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(5);

/// One connection with a name for messages.
pub struct Session {
    name: &'static str,
    pid: i32,
    client: Arc<Client>,
    running: Option<JoinHandle<Result<Vec<SimpleQueryMessage>, Error>>>,
}

impl Session {
    pub async fn new(name: &'static str, client: Client) -> Self {
        let pid = client.query_one("select pg_backend_pid()", &[]).await.expect("a pid").get(0);
        Self { name, pid, client: Arc::new(client), running: None }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The server process of this session.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Runs statements to their end.
    pub async fn run(&self, sql: &str) {
        if let Err(e) = self.client.batch_execute(sql).await {
            panic!("session {:?}: {sql}: {}", self.name, backfilld::Error::from(e));
        }
    }

    /// Begins statements in the background. [`Session::finish`] has their result.
    pub fn send(&mut self, sql: &str) {
        assert!(self.running.is_none(), "session {:?} has a statement under way", self.name);
        let (client, sql) = (self.client.clone(), sql.to_owned());
        self.running = Some(tokio::spawn(async move { client.simple_query(&sql).await }));
    }

    /// Whether what was sent has ended.
    pub fn is_finished(&self) -> bool {
        self.running.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Whether there is something for [`Session::finish`].
    pub fn has_result(&self) -> bool {
        self.running.is_some()
    }

    /// The result of what was sent.
    pub async fn finish(&mut self) -> Result<Vec<SimpleQueryMessage>, Error> {
        let running = self.running.take();
        let running = running.unwrap_or_else(|| panic!("session {:?} has nothing under way", self.name));
        let result = tokio::time::timeout(DEADLINE, running).await;
        result
            .unwrap_or_else(|_| panic!("session {:?} did not finish within {DEADLINE:?}", self.name))
            .expect("no panic")
    }

    /// As [`Session::finish`]; a failure fails the test.
    pub async fn finish_ok(&mut self) -> Vec<SimpleQueryMessage> {
        let name = self.name;
        self.finish().await.unwrap_or_else(|e| panic!("session {name:?}: {}", backfilld::Error::from(e)))
    }

    /// As [`Session::finish`], for a statement that must fail: its SQLSTATE.
    pub async fn finish_err(&mut self) -> String {
        let name = self.name;
        match self.finish().await {
            Ok(_) => panic!("session {name:?} succeeded, but had to fail"),
            Err(e) => e.code().map(|code| code.code().to_owned()).unwrap_or_default(),
        }
    }
}

/// Looks at a condition until it holds; the test fails if it does not within [`DEADLINE`].
pub async fn wait_until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let mut ticks = tokio::time::interval(POLL);
    let looking = async {
        loop {
            ticks.tick().await;
            if condition().await {
                break;
            }
        }
    };
    if tokio::time::timeout(DEADLINE, looking).await.is_err() {
        panic!("waited {DEADLINE:?} in vain: {what}");
    }
}
