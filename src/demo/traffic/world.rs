//! Whom and what the traffic knows: users, conversations and their owners, as an application's session store would.

use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio_postgres::{Client, Error};
use uuid::Uuid;

use super::lock;

/// Enough to spread the traffic, and little to load from a table of any size.
const SAMPLE: i64 = 2000;

/// A user who stays.
#[derive(Debug, Clone, Copy)]
pub(super) struct User {
    pub(super) id: Uuid,
    pub(super) auth: Uuid,
}

/// A conversation of a user who stays.
#[derive(Debug)]
pub(super) struct Conversation {
    pub(super) id: Uuid,
    /// `auth.users.id` of the owner, as far as we know.
    owner: Mutex<Uuid>,
    /// Transfers begun and ended; equal when none is under way.
    begun: AtomicU64,
    ended: AtomicU64,
}

/// When a request began, as far as a conversation's transfers are concerned.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark(u64);

impl Conversation {
    pub(super) fn owner(&self) -> Uuid {
        *lock(&self.owner)
    }

    pub(super) fn set_owner(&self, owner: Uuid) {
        *lock(&self.owner) = owner;
    }

    pub(super) fn mark(&self) -> Mark {
        Mark(self.ended.load(Ordering::SeqCst))
    }

    /// Whether a transfer was under way at any time since `mark`.
    pub(super) fn transferred_since(&self, mark: Mark) -> bool {
        self.begun.load(Ordering::SeqCst) != mark.0
    }

    /// Begins a transfer, unless one is under way.
    pub(super) fn begin_transfer(&self) -> bool {
        let ended = self.ended.load(Ordering::SeqCst);
        self.begun.compare_exchange(ended, ended + 1, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }

    pub(super) fn end_transfer(&self) {
        self.ended.fetch_add(1, Ordering::SeqCst);
    }
}

/// A user who is about to leave, with the conversations that go too.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) auth: Uuid,
    pub(super) conversations: Vec<Uuid>,
}

/// What the workers share.
#[derive(Debug)]
pub(super) struct World {
    pub(super) users: Vec<User>,
    /// Never empty. The first one is the hot one.
    pub(super) conversations: Vec<Conversation>,
    /// Generated messages with the index of their conversation.
    pub(super) messages: Vec<(Uuid, usize)>,
    pub(super) leaving: Vec<Leaving>,
}

impl World {
    /// Reads a sample. `auth` may read `auth.users`; `app` may become `service_role`.
    pub(super) async fn load(auth: &Client, app: &Client) -> Result<Self, Error> {
        let ids = |rows: Vec<tokio_postgres::Row>| rows.iter().map(|r| r.try_get(0)).collect::<Result<Vec<Uuid>, _>>();
        let leaving = auth.query("select id from auth.users where email like 'leaving-%' order by id", &[]).await?;
        let leaving = ids(leaving)?;
        app.batch_execute("set role service_role").await?;
        let mut going = Vec::new();
        for auth in &leaving {
            let rows = app.query("select id from public.conversations where auth_user_id = $1", &[auth]).await?;
            going.push(Leaving { auth: *auth, conversations: ids(rows)? });
        }
        let users = app
            .query(
                "select id, auth_user_id from public.users where auth_user_id <> all($1) order by id limit $2",
                &[&leaving, &SAMPLE],
            )
            .await?
            .iter()
            .map(|r| Ok(User { id: r.try_get(0)?, auth: r.try_get(1)? }))
            .collect::<Result<_, Error>>()?;
        let conversations = app
            .query(
                "select id, auth_user_id from public.conversations where auth_user_id <> all($1) order by id limit $2",
                &[&leaving, &SAMPLE],
            )
            .await?
            .iter()
            .map(|r| {
                Ok(Conversation {
                    id: r.try_get(0)?,
                    owner: Mutex::new(r.try_get(1)?),
                    begun: AtomicU64::new(0),
                    ended: AtomicU64::new(0),
                })
            })
            .collect::<Result<Vec<_>, Error>>()?;
        let all: Vec<Uuid> = conversations.iter().map(|c| c.id).collect();
        let messages = app
            .query(
                "select m.id, c.n - 1 from unnest($1::uuid[]) with ordinality as c(id, n),
                   lateral (select id from public.messages where conversation_id = c.id order by created_at limit 3) m",
                &[&all],
            )
            .await?
            .iter()
            .map(|r| Ok((r.try_get(0)?, usize::try_from(r.try_get::<_, i64>(1)?).unwrap_or_default())))
            .collect::<Result<Vec<_>, Error>>()?;
        app.batch_execute("reset role").await?;
        debug_assert_eq!(messages.iter().map(|m| m.0).collect::<HashSet<_>>().len(), messages.len());
        Ok(Self { users, conversations, messages, leaving: going })
    }
}
