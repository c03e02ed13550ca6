//! One connection of the application: chooses requests, sends them, judges the answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};
use tokio_postgres::Config;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::request::{Answer, Failure, Request, Session, Who};
use super::world::{Conversation, Leaving, Mark};
use super::{Shared, connect, lock};

/// As often as a careful application repeats a transaction that the server asked it to repeat.
const ATTEMPTS: u32 = 5;

/// How long an application tries to get a new connection before it gives up.
const RECONNECT: Duration = Duration::from_secs(30);

/// Enough to choose from, and little to search, however long it runs.
const MINE: usize = 5000;

/// What a worker does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Job {
    /// Everything; edits and deletes only messages of its slice, so that it knows what to expect.
    Mixed { slice: u32, of: u32 },
    /// Sends into the first conversation, at the same time as the other hot workers.
    Hot,
    /// Deletes accounts until none is left that wants to go.
    Leave,
}

pub(super) struct Worker {
    shared: Arc<Shared>,
    config: Config,
    session: Session,
    job: Job,
    rng: StdRng,
    pace: Option<Duration>,
    /// Messages that only this worker edits and deletes.
    mine: Vec<(Uuid, usize)>,
    /// Next account to leave.
    leaving: usize,
    sequence: u64,
}

impl Worker {
    pub(super) async fn connect(
        shared: Arc<Shared>,
        config: Config,
        job: Job,
        seed: u64,
        pace: Option<Duration>,
    ) -> Result<Self, tokio_postgres::Error> {
        let session = Session::new(connect(&config).await?);
        let mine = match job {
            Job::Mixed { slice, of } => {
                shared.world.messages.iter().skip(slice as usize).step_by(of as usize).copied().collect()
            }
            Job::Hot | Job::Leave => Vec::new(),
        };
        let rng = StdRng::seed_from_u64(seed);
        Ok(Self { shared, config, session, job, rng, pace, mine, leaving: 0, sequence: 0 })
    }

    pub(super) async fn run(mut self, cancel: CancellationToken) {
        // Hot workers send at the same moment, the others spread over the period.
        let offset = match self.job {
            Job::Mixed { slice, of } => f64::from(slice) / f64::from(of),
            Job::Hot | Job::Leave => 0.0,
        };
        let mut ticks = self.pace.map(|pace| interval_at(self.shared.epoch + pace.mul_f64(offset), pace));
        if let Some(ticks) = &mut ticks {
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        }
        while !cancel.is_cancelled() {
            if let Some(ticks) = &mut ticks {
                tokio::select! {
                    () = cancel.cancelled() => break,
                    _ = ticks.tick() => {}
                }
            }
            let Some(request) = self.choose() else { break };
            if self.shared.sent.fetch_add(1, Ordering::Relaxed) >= self.shared.max_requests {
                break;
            }
            let started = Instant::now();
            self.send(&request).await;
            let phase = self.shared.phase();
            lock(&self.shared.stats).record(phase, request.name(), started.elapsed(), self.pace);
            if self.session.client.is_closed() && !self.reconnect(&cancel).await {
                break;
            }
        }
    }

    fn choose(&mut self) -> Option<Request> {
        match self.job {
            Job::Hot => Some(Request::Send { at: 0, content: self.content() }),
            Job::Leave => {
                let who = self.shared.world.leaving.get(self.leaving)?;
                self.leaving += 1;
                let who = Leaving { auth: who.auth, conversations: who.conversations.clone() };
                Some(Request::Leave { who })
            }
            Job::Mixed { .. } => Some(self.choose_mixed()),
        }
    }

    /// Per cent of the traffic.
    fn choose_mixed(&mut self) -> Request {
        let at = self.rng.random_range(0..self.shared.world.conversations.len());
        let (id, content) = (Uuid::new_v4(), self.content());
        let own = (!self.mine.is_empty()).then(|| self.mine[self.rng.random_range(0..self.mine.len())]);
        match (self.rng.random_range(0..100), own) {
            (0..20, _) | (_, None) => Request::Send { at, content },
            (20..35, _) => Request::List { at },
            (35..43, _) => Request::Select { at },
            (43..44, _) => Request::Inbox { at },
            (44..50, Some((id, at))) => Request::Look { at, id },
            (50..60, Some((id, at))) => Request::Edit { at, id, content },
            (60..64, Some((id, at))) => Request::Delete { at, id },
            (64..72, _) => Request::Insert { at, id, content },
            (72..80, Some((id, at))) => Request::Save { at, id, content },
            (80..83, _) => {
                let rows = (0..5).map(|_| (Uuid::new_v4(), self.content())).collect();
                Request::Copy { at, rows }
            }
            (83..86, _) => Request::Upsert { at, id, content },
            (86..89, Some((id, at))) => Request::Upsert { at, id, content },
            (89..92, _) => self.transfer(at),
            (92..97, _) => self.foreign(at, |intruder| Request::ForeignInsert { at, intruder, id, content }),
            (_, _) => self.foreign(at, |intruder| Request::ForeignRead { at, intruder }),
        }
    }

    fn transfer(&mut self, at: usize) -> Request {
        // The hot conversation is transferred as often as all others together.
        let at = if self.rng.random_bool(0.5) { 0 } else { at };
        let to = self.shared.world.users[self.rng.random_range(0..self.shared.world.users.len())];
        if self.shared.world.conversations[at].begin_transfer() {
            Request::Transfer { at, to }
        } else {
            Request::List { at }
        }
    }

    fn foreign(&mut self, at: usize, request: impl FnOnce(Uuid) -> Request) -> Request {
        let intruder = self.shared.world.users[self.rng.random_range(0..self.shared.world.users.len())].auth;
        if intruder == self.shared.world.conversations[at].owner() { Request::List { at } } else { request(intruder) }
    }

    /// Sends until it is answered, and judges the answer.
    async fn send(&mut self, request: &Request) {
        let shared = self.shared.clone();
        let conversation = request.at().map(|at| &shared.world.conversations[at]);
        let mark = conversation.map(Conversation::mark);
        let owner = conversation.map_or(Uuid::nil(), Conversation::owner);
        let at = conversation.map_or(Uuid::nil(), |c| c.id);
        let who = request.who(owner);
        let mut attempt = 1;
        let result = loop {
            let failure = match self.session.attempt(request, at, who).await {
                Ok(answer) => break Ok(answer),
                Err(failure) => failure,
            };
            if !failure.is_connection() {
                let _ = self.session.client.batch_execute("rollback").await;
            }
            if !matches!(failure.sqlstate(), "40P01" | "40001") || attempt == ATTEMPTS {
                break Err(failure);
            }
            lock(&shared.stats).retry(failure.sqlstate());
            let pause = self.rng.random_range(1..20 * u64::from(attempt));
            sleep(Duration::from_millis(pause)).await;
            attempt += 1;
        };
        match result {
            Ok(answer) => self.answered(request, answer, conversation.zip(mark), who).await,
            Err(failure) => self.failed(request, failure, conversation.zip(mark), who).await,
        }
        if let (Request::Transfer { .. }, Some(conversation)) = (request, conversation) {
            conversation.end_transfer();
        }
    }

    async fn answered(
        &mut self,
        request: &Request,
        answer: Answer,
        conversation: Option<(&Conversation, Mark)>,
        who: Who,
    ) {
        let name = request.name();
        match (request, answer, conversation) {
            (
                Request::Look { .. } | Request::Edit { .. } | Request::Delete { .. },
                Answer::Rows(0),
                Some((c, mark)),
            ) => {
                if self.changed_hands(c, mark, who).await {
                    lock(&self.shared.stats).expected_refusals += 1;
                } else if matches!(request, Request::Look { .. }) {
                    lock(&self.shared.stats).own_rows_missed += 1;
                } else {
                    lock(&self.shared.stats).error(name, "no row", "an own message was not found");
                }
            }
            (Request::ForeignRead { .. }, Answer::Rows(rows), Some((c, mark))) => {
                if rows > 0 && !self.changed_hands_to(c, mark, who).await {
                    lock(&self.shared.stats).foreign_rows_seen += rows;
                }
            }
            (Request::ForeignInsert { id, content, .. }, _, Some((c, mark))) => {
                if !self.changed_hands_to(c, mark, who).await {
                    lock(&self.shared.stats).foreign_inserts_accepted += 1;
                }
                lock(&self.shared.ledger).live(*id, c.id, content);
            }
            (
                Request::Save { .. }
                | Request::Insert { .. }
                | Request::Upsert { .. }
                | Request::Copy { .. }
                | Request::Transfer { .. }
                | Request::Leave { .. },
                Answer::Rows(0),
                _,
            ) => lock(&self.shared.stats).error(name, "no row", "nothing was written"),
            (Request::Transfer { to, .. }, _, Some((c, _))) => {
                c.set_owner(to.auth);
                lock(&self.shared.ledger).moved(c.id);
            }
            (Request::Leave { who }, _, _) => {
                let mut ledger = lock(&self.shared.ledger);
                who.conversations.iter().for_each(|id| ledger.gone(*id, true));
            }
            (_, answer, Some((c, _))) => self.acknowledged(request, answer, c.id),
            (_, _, None) => {}
        }
    }

    /// Writes down what the server has promised.
    fn acknowledged(&mut self, request: &Request, answer: Answer, conversation: Uuid) {
        let mut ledger = lock(&self.shared.ledger);
        match request {
            Request::Send { at, content } => {
                let Answer::Id(id) = answer else { return };
                ledger.live(id, conversation, content);
                if matches!(self.job, Job::Mixed { .. }) && self.mine.len() < MINE {
                    self.mine.push((id, *at));
                }
            }
            Request::Edit { id, content, .. } | Request::Save { id, content, .. } => {
                ledger.live(*id, conversation, content);
            }
            Request::Insert { at, id, content } | Request::Upsert { at, id, content } => {
                ledger.live(*id, conversation, content);
                if self.mine.len() < MINE && !self.mine.iter().any(|(mine, _)| mine == id) {
                    self.mine.push((*id, *at));
                }
            }
            Request::Copy { rows, .. } => {
                rows.iter().for_each(|(id, content)| ledger.live(*id, conversation, content));
            }
            Request::Delete { id, .. } => {
                ledger.deleted(*id, conversation);
                self.mine.retain(|(mine, _)| mine != id);
            }
            _ => {}
        }
    }

    async fn failed(
        &mut self,
        request: &Request,
        failure: Failure,
        conversation: Option<(&Conversation, Mark)>,
        who: Who,
    ) {
        if let Some((c, mark)) = conversation
            && failure.sqlstate() == "42501"
        {
            if matches!(request, Request::ForeignInsert { .. }) {
                lock(&self.shared.stats).foreign_inserts_refused += 1;
                return;
            }
            if matches!(who, Who::User(_)) && self.changed_hands(c, mark, who).await {
                lock(&self.shared.stats).expected_refusals += 1;
                return;
            }
        }
        if let (true, Some(answer)) = (failure.is_connection(), failure.uncommitted) {
            self.outcome_unknown(request, answer, conversation.map(|(c, _)| c.id));
        }
        let code = if failure.sqlstate().is_empty() { "connection" } else { failure.sqlstate() }.to_owned();
        let message = crate::Error::from(failure.error).to_string();
        lock(&self.shared.stats).error(request.name(), &code, message);
    }

    fn outcome_unknown(&mut self, request: &Request, answer: Answer, conversation: Option<Uuid>) {
        let mut ledger = lock(&self.shared.ledger);
        match (request, conversation) {
            (
                Request::Edit { id, .. }
                | Request::Save { id, .. }
                | Request::Delete { id, .. }
                | Request::Insert { id, .. }
                | Request::Upsert { id, .. }
                | Request::ForeignInsert { id, .. },
                Some(conversation),
            ) => {
                ledger.unknown(*id, conversation);
                self.mine.retain(|(mine, _)| mine != id);
            }
            (Request::Send { .. }, Some(conversation)) => {
                if let Answer::Id(id) = answer {
                    ledger.unknown(id, conversation);
                }
            }
            (Request::Leave { who }, _) => who.conversations.iter().for_each(|id| ledger.gone(*id, false)),
            (Request::Copy { rows, .. }, Some(conversation)) => {
                rows.iter().for_each(|(id, _)| ledger.unknown(*id, conversation));
            }
            (Request::Transfer { .. }, Some(conversation)) => ledger.moved(conversation),
            _ => {}
        }
    }

    /// Whether a refusal of `who` is right, because the conversation is, or for a moment was, somebody else's.
    async fn changed_hands(&mut self, conversation: &Conversation, mark: Mark, who: Who) -> bool {
        let Some(owner) = self.reread(conversation).await else { return false };
        conversation.transferred_since(mark) || !matches!(who, Who::User(user) if user == owner)
    }

    /// Whether an acceptance of `who` is right, because the conversation is, or for a moment may have been, theirs.
    async fn changed_hands_to(&mut self, conversation: &Conversation, mark: Mark, who: Who) -> bool {
        let Some(owner) = self.reread(conversation).await else { return false };
        conversation.transferred_since(mark) || matches!(who, Who::User(user) if user == owner)
    }

    async fn reread(&mut self, conversation: &Conversation) -> Option<Uuid> {
        let owner = self.session.owner(conversation.id).await?;
        conversation.set_owner(owner);
        Some(owner)
    }

    async fn reconnect(&mut self, cancel: &CancellationToken) -> bool {
        let deadline = Instant::now() + RECONNECT;
        while !cancel.is_cancelled() && Instant::now() < deadline {
            if let Ok(client) = connect(&self.config).await {
                self.session = Session::new(client);
                return true;
            }
            sleep(Duration::from_millis(200)).await;
        }
        lock(&self.shared.stats).error("connect", "connection", "no new connection within 30 s, or stopped before");
        false
    }

    fn content(&mut self) -> String {
        self.sequence += 1;
        let length = self.rng.random_range(40..240);
        let text = "Is the boat back? Not yet, the tide is late and the light is going. ".repeat(4);
        format!("{} {}", self.sequence, &text[..length])
    }
}
