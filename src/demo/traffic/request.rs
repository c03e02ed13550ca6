//! The application's requests: who sends what, in one transaction.

use std::collections::HashMap;

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Row, Statement};
use uuid::Uuid;

use super::ledger::copy;
use super::world::{Leaving, User};

/// The column that appears while the traffic runs; an application with whole-row saves begins to write it by then.
const NEW_COLUMN: &str = "auth_user_id";

/// One request. `at` is the index of a conversation in the world.
#[derive(Debug)]
pub(super) enum Request {
    /// `add_message()` by the owner.
    Send { at: usize, content: String },
    /// `get_conversation_messages()` by the owner.
    List { at: usize },
    /// The same as a plain select under row level security.
    Select { at: usize },
    /// The owner's newest messages of all conversations: only the policies restrict it.
    Inbox { at: usize },
    /// The owner looks for an own message, which must be visible.
    Look { at: usize, id: Uuid },
    /// The owner edits a message.
    Edit { at: usize, id: Uuid, content: String },
    /// The owner deletes a message.
    Delete { at: usize, id: Uuid },
    /// A service inserts without naming the new column.
    Insert { at: usize, id: Uuid, content: String },
    /// An object-relational mapper loads a row and saves all of its columns; it knows no value for the new one.
    Save { at: usize, id: Uuid, content: String },
    /// A service copies rows in.
    Copy { at: usize, rows: Vec<(Uuid, String)> },
    /// INSERT ... ON CONFLICT DO UPDATE.
    Upsert { at: usize, id: Uuid, content: String },
    /// The conversation changes hands.
    Transfer { at: usize, to: User },
    /// A user inserts into somebody else's conversation, in their own name.
    ForeignInsert { at: usize, intruder: Uuid, id: Uuid, content: String },
    /// A user reads somebody else's conversation.
    ForeignRead { at: usize, intruder: Uuid },
    /// An account is deleted, with everything that belongs to it.
    Leave { who: Leaving },
}

/// Under which identity a request runs.
#[derive(Debug, Clone, Copy)]
pub(super) enum Who {
    /// `authenticated` with this `sub`.
    User(Uuid),
    /// `service_role`.
    Service,
    /// As logged in.
    Login,
}

/// What a request that succeeded came back with.
#[derive(Debug, Clone, Copy)]
pub(super) enum Answer {
    /// Rows read or written.
    Rows(u64),
    /// The new message's id.
    Id(Uuid),
}

/// A failed attempt.
pub(super) struct Failure {
    pub(super) error: tokio_postgres::Error,
    /// It failed in COMMIT, after this answer: if the connection is gone, nobody knows whether it holds.
    pub(super) uncommitted: Option<Answer>,
}

impl From<tokio_postgres::Error> for Failure {
    fn from(error: tokio_postgres::Error) -> Self {
        Self { error, uncommitted: None }
    }
}

impl Failure {
    pub(super) fn sqlstate(&self) -> &str {
        self.error.code().map_or("", |code| code.code())
    }

    /// The connection is gone or out of step: the server gave no answer to this request.
    pub(super) fn is_connection(&self) -> bool {
        self.error.as_db_error().is_none()
            || self.error.is_closed()
            || self.sqlstate().starts_with("08")
            || self.sqlstate().starts_with("57P")
    }
}

impl Request {
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Send { .. } => "send",
            Self::List { .. } => "list",
            Self::Select { .. } => "select",
            Self::Inbox { .. } => "inbox",
            Self::Look { .. } => "look",
            Self::Edit { .. } => "edit",
            Self::Delete { .. } => "delete",
            Self::Insert { .. } => "service insert",
            Self::Save { .. } => "whole-row save",
            Self::Copy { .. } => "copy",
            Self::Upsert { .. } => "upsert",
            Self::Transfer { .. } => "transfer",
            Self::ForeignInsert { .. } => "foreign insert",
            Self::ForeignRead { .. } => "foreign read",
            Self::Leave { .. } => "delete user",
        }
    }

    /// The conversation it is about.
    pub(super) fn at(&self) -> Option<usize> {
        match self {
            Self::Send { at, .. }
            | Self::List { at }
            | Self::Select { at }
            | Self::Inbox { at }
            | Self::Look { at, .. }
            | Self::Edit { at, .. }
            | Self::Delete { at, .. }
            | Self::Insert { at, .. }
            | Self::Save { at, .. }
            | Self::Copy { at, .. }
            | Self::Upsert { at, .. }
            | Self::Transfer { at, .. }
            | Self::ForeignInsert { at, .. }
            | Self::ForeignRead { at, .. } => Some(*at),
            Self::Leave { .. } => None,
        }
    }

    /// Who sends it, where `owner` owns the conversation.
    pub(super) fn who(&self, owner: Uuid) -> Who {
        match self {
            Self::Send { .. }
            | Self::List { .. }
            | Self::Select { .. }
            | Self::Inbox { .. }
            | Self::Look { .. }
            | Self::Edit { .. }
            | Self::Delete { .. } => Who::User(owner),
            Self::ForeignInsert { intruder, .. } | Self::ForeignRead { intruder, .. } => Who::User(*intruder),
            Self::Insert { .. }
            | Self::Save { .. }
            | Self::Copy { .. }
            | Self::Upsert { .. }
            | Self::Transfer { .. } => Who::Service,
            Self::Leave { .. } => Who::Login,
        }
    }
}

/// A connection of the application, with its named prepared statements.
pub(super) struct Session {
    pub(super) client: Client,
    prepared: HashMap<&'static str, Statement>,
}

impl Session {
    pub(super) fn new(client: Client) -> Self {
        Self { client, prepared: HashMap::new() }
    }

    /// The whole transaction.
    pub(super) async fn attempt(&mut self, request: &Request, at: Uuid, who: Who) -> Result<Answer, Failure> {
        let begin = match who {
            Who::User(id) => format!(
                "begin; set local role authenticated; \
                 select set_config('request.jwt.claims', '{{\"sub\":\"{id}\",\"role\":\"authenticated\"}}', true)"
            ),
            Who::Service => "begin; set local role service_role; \
                 select set_config('request.jwt.claims', '{\"role\":\"service_role\"}', true)"
                .to_owned(),
            Who::Login => "begin".to_owned(),
        };
        self.client.batch_execute(&begin).await?;
        let answer = self.body(request, at, who).await?;
        self.client.batch_execute("commit").await.map_err(|error| Failure { error, uncommitted: Some(answer) })?;
        Ok(answer)
    }

    /// Who owns the conversation now; `None` if that cannot be found out.
    pub(super) async fn owner(&mut self, conversation: Uuid) -> Option<Uuid> {
        self.client.batch_execute("begin; set local role service_role").await.ok()?;
        let row = self.one("select auth_user_id from public.conversations where id = $1", &[&conversation]).await;
        self.client.batch_execute("commit").await.ok()?;
        row.ok()?.try_get(0).ok()
    }

    async fn body(&mut self, request: &Request, at: Uuid, who: Who) -> Result<Answer, tokio_postgres::Error> {
        match request {
            Request::Send { content, .. } => {
                self.id("select public.add_message($1, 'user', $2)", &[&at, content]).await
            }
            Request::List { .. } => {
                self.read("select id, role, content from public.get_conversation_messages($1)", &[&at]).await
            }
            Request::Select { .. } | Request::ForeignRead { .. } => {
                let sql = "select id, role, content, created_at from public.messages \
                           where conversation_id = $1 order by created_at desc limit 50";
                self.read(sql, &[&at]).await
            }
            Request::Inbox { .. } => {
                let sql = "select id, conversation_id, content, created_at from public.messages \
                           order by created_at desc limit 20";
                self.read(sql, &[]).await
            }
            Request::Look { id, .. } => self.read("select id from public.messages where id = $1", &[id]).await,
            Request::Edit { id, content, .. } => {
                self.write("update public.messages set content = $2 where id = $1", &[id, content]).await
            }
            Request::Delete { id, .. } => self.write("delete from public.messages where id = $1", &[id]).await,
            Request::Insert { id, content, .. } => {
                let sql = "insert into public.messages (id, conversation_id, role, content, metadata) \
                           values ($1, $2, 'assistant', $3, '{\"by\": \"service\"}')";
                self.write(sql, &[id, &at, content]).await
            }
            Request::Save { id, content, .. } => self.save(*id, content).await,
            Request::Copy { rows, .. } => {
                let lines = rows.iter().map(|(id, content)| format!("{id}\t{at}\tassistant\t{content}\n")).collect();
                let target = "public.messages (id, conversation_id, role, content)";
                Ok(Answer::Rows(copy(&self.client, target, lines).await?))
            }
            Request::Upsert { id, content, .. } => {
                let sql = "insert into public.messages (id, conversation_id, role, content) values ($1, $2, 'user', $3) \
                           on conflict (id) do update set content = excluded.content";
                self.write(sql, &[id, &at, content]).await
            }
            Request::Transfer { to, .. } => {
                let sql = "update public.conversations set user_id = $2, auth_user_id = $3 where id = $1";
                self.write(sql, &[&at, &to.id, &to.auth]).await
            }
            Request::ForeignInsert { id, content, .. } => self.intrude(*id, at, content, who).await,
            Request::Leave { who } => self.write("delete from auth.users where id = $1", &[&who.auth]).await,
        }
    }

    async fn save(&mut self, id: Uuid, content: &str) -> Result<Answer, tokio_postgres::Error> {
        let load = "select conversation_id, role, image_url, metadata, created_at::text, updated_at::text \
                    from public.messages where id = $1";
        // Loading holds a lock that keeps the table's columns as they are until the save.
        let Some(row) = self.rows(load, &[&id]).await?.pop() else { return Ok(Answer::Rows(0)) };
        let (conversation, role): (Uuid, String) = (row.try_get(0)?, row.try_get(1)?);
        let (image, metadata): (Option<String>, serde_json::Value) = (row.try_get(2)?, row.try_get(3)?);
        let (created, updated): (String, String) = (row.try_get(4)?, row.try_get(5)?);
        let sql = if self.has_new_column().await? {
            "update public.messages set conversation_id = $2, role = $3, content = $4, image_url = $5, metadata = $6, \
             created_at = $7::text::timestamptz, updated_at = $8::text::timestamptz, auth_user_id = null where id = $1"
        } else {
            "update public.messages set conversation_id = $2, role = $3, content = $4, image_url = $5, metadata = $6, \
             created_at = $7::text::timestamptz, updated_at = $8::text::timestamptz where id = $1"
        };
        self.write(sql, &[&id, &conversation, &role, &content, &image, &metadata, &created, &updated]).await
    }

    /// Names the own user id as owner as soon as there is a column for it.
    async fn intrude(&mut self, id: Uuid, at: Uuid, content: &str, who: Who) -> Result<Answer, tokio_postgres::Error> {
        let Who::User(intruder) = who else { return Ok(Answer::Rows(0)) };
        self.rows("select from public.messages limit 0", &[]).await?;
        if self.has_new_column().await? {
            let sql = "insert into public.messages (id, conversation_id, role, content, auth_user_id) \
                       values ($1, $2, 'user', $3, $4)";
            self.write(sql, &[&id, &at, &content, &intruder]).await
        } else {
            let sql = "insert into public.messages (id, conversation_id, role, content) values ($1, $2, 'user', $3)";
            self.write(sql, &[&id, &at, &content]).await
        }
    }

    async fn has_new_column(&mut self) -> Result<bool, tokio_postgres::Error> {
        let sql = "select exists (select from pg_catalog.pg_attribute \
                   where attrelid = 'public.messages'::regclass and attname = $1::text and not attisdropped)";
        self.one(sql, &[&NEW_COLUMN]).await?.try_get(0)
    }

    async fn statement(&mut self, sql: &'static str) -> Result<Statement, tokio_postgres::Error> {
        if let Some(statement) = self.prepared.get(sql) {
            return Ok(statement.clone());
        }
        let statement = self.client.prepare(sql).await?;
        self.prepared.insert(sql, statement.clone());
        Ok(statement)
    }

    async fn rows(
        &mut self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Vec<Row>, tokio_postgres::Error> {
        let statement = self.statement(sql).await?;
        self.client.query(&statement, params).await
    }

    async fn one(&mut self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Row, tokio_postgres::Error> {
        let statement = self.statement(sql).await?;
        self.client.query_one(&statement, params).await
    }

    async fn read(
        &mut self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Answer, tokio_postgres::Error> {
        Ok(Answer::Rows(self.rows(sql, params).await?.len() as u64))
    }

    async fn write(
        &mut self,
        sql: &'static str,
        params: &[&(dyn ToSql + Sync)],
    ) -> Result<Answer, tokio_postgres::Error> {
        let statement = self.statement(sql).await?;
        Ok(Answer::Rows(self.client.execute(&statement, params).await?))
    }

    async fn id(&mut self, sql: &'static str, params: &[&(dyn ToSql + Sync)]) -> Result<Answer, tokio_postgres::Error> {
        Ok(Answer::Id(self.one(sql, params).await?.try_get(0)?))
    }
}
