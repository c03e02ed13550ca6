//! The types of `job.toml`. `docs/job.schema.json` is generated from them, and a test keeps it so.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pg::ident::{Ident, QualifiedName};

pub use super::verification::{Verification, Watch};

/// The alias of the target table in every expression of a job.
pub const TARGET_ALIAS: &str = "t";

/// A backfill job: what to fill, from where, and what to switch over to it afterwards.
///
/// Names of tables are written as in SQL, `public.messages` or `public."Messages"`. All other names (columns, indexes,
/// constraints, policies, roles) are written exactly as they are, without quotes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JobSpec {
    /// Unique name of the job, 1 to 38 of `a-z 0-9 _`, starting with a letter. It is part of the names of triggers.
    pub name: String,
    /// One line for people: what this job is for.
    #[serde(default)]
    pub description: String,
    /// The table whose rows are filled. Its alias in expressions is `t`.
    pub target: Target,
    /// The joins from a target row to the values, in order; each may refer to `t` and to the aliases before it.
    #[serde(default)]
    pub source: Vec<Join>,
    /// The columns to fill; one or more.
    pub columns: Vec<Column>,
    /// Foreign keys to add after the backfill.
    #[serde(default)]
    pub foreign_keys: Vec<ForeignKey>,
    /// Indexes to build after the backfill, concurrently.
    #[serde(default)]
    pub indexes: Vec<Index>,
    /// Functions to replace in the flip.
    #[serde(default)]
    pub functions: Vec<Function>,
    /// Row level security policies to replace in the flip.
    #[serde(default)]
    pub policies: Option<Policies>,
    /// Other paths to the same value that must agree with it for every target row before the flip.
    #[serde(default)]
    pub agree: Vec<Agree>,
    /// Under which roles and users old and new policies are compared.
    #[serde(default)]
    pub access: Option<super::access::Access>,
    /// What an UPDATE of the target sets off, and what shall happen to it during batches.
    #[serde(default)]
    pub side_effects: SideEffects,
    /// How batches are cut.
    #[serde(default)]
    pub batching: Batching,
    /// What makes batches wait.
    #[serde(default)]
    pub throttle: super::throttle::Throttle,
    /// How the result is verified.
    #[serde(default)]
    pub verification: Verification,
    /// Watching after the flip. Without this section the job is done at once.
    #[serde(default)]
    pub watch: Option<Watch>,
    /// What the report measures of the application.
    #[serde(default)]
    pub report: super::report::Report,
    /// Phases before which the job stops until `backfilld cutover` says go.
    #[serde(default)]
    pub hold_before: Vec<HoldPoint>,
}

/// The table whose rows are filled.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// Schema-qualified table, written as in SQL.
    #[schemars(with = "String")]
    pub table: QualifiedName,
    /// Columns of a unique, NOT NULL key to go by. Default: the primary key.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub key: Vec<Ident>,
}

/// One step of the chain from a target row to the value.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// Short name for expressions; lower case, not `t`.
    #[schemars(with = "String")]
    pub alias: Ident,
    /// Schema-qualified table, written as in SQL.
    #[schemars(with = "String")]
    pub table: QualifiedName,
    /// Equalities: column of this table = `alias.column` of an earlier one. Together they must be a unique key of this
    /// table, so that there is never more than one value.
    #[schemars(with = "BTreeMap<String, String>")]
    pub on: BTreeMap<Ident, ColumnRef>,
    /// `inner` (default): a target row without this row has no value. `left`: the value may still come from elsewhere.
    #[serde(default)]
    pub join: JoinKind,
}

/// How a joined table is joined.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JoinKind {
    /// No row, no value.
    #[default]
    Inner,
    /// No row, NULLs.
    Left,
}

/// `alias.column`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ColumnRef {
    /// The table's alias.
    pub alias: Ident,
    /// The column.
    pub column: Ident,
}

/// A column to fill.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Column {
    /// Name of the column; it is created in Expand if it does not exist.
    #[schemars(with = "String")]
    pub name: Ident,
    /// SQL type, as in `create table`. Default: the type of the value.
    #[serde(default, rename = "type")]
    pub sql_type: Option<String>,
    /// SQL expression for the value over `t` and the source aliases; every column with its alias, every function and
    /// type outside `pg_catalog` with its schema.
    pub value: String,
    /// Set NOT NULL once verified.
    #[serde(default)]
    pub not_null: bool,
    /// Comment to put on the column.
    #[serde(default)]
    pub comment: Option<String>,
}

/// A foreign key on the target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ForeignKey {
    /// Constraint name.
    #[schemars(with = "String")]
    pub name: Ident,
    /// Columns of the target.
    #[schemars(with = "Vec<String>")]
    pub columns: Vec<Ident>,
    /// Referenced table, written as in SQL.
    #[schemars(with = "String")]
    pub references: QualifiedName,
    /// Referenced columns.
    #[schemars(with = "Vec<String>")]
    pub referenced_columns: Vec<Ident>,
    /// What deleting the referenced row does.
    #[serde(default)]
    pub on_delete: Action,
    /// What changing the referenced key does.
    #[serde(default)]
    pub on_update: Action,
}

/// A referential action.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// Refuse at the end of the statement or transaction.
    #[default]
    NoAction,
    /// Refuse at once.
    Restrict,
    /// Do the same to the referencing rows.
    Cascade,
    /// Set the referencing columns to NULL.
    SetNull,
}

/// An index on the target.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Index {
    /// Index name; it lives in the target's schema.
    #[schemars(with = "String")]
    pub name: Ident,
    /// Indexed columns, in order.
    #[schemars(with = "Vec<String>")]
    pub columns: Vec<Ident>,
    /// Access method.
    #[serde(default = "btree")]
    #[schemars(with = "String")]
    pub method: Ident,
    /// A unique index.
    #[serde(default)]
    pub unique: bool,
    /// Predicate of a partial index, over the target's bare columns.
    #[serde(default, rename = "where")]
    pub predicate: Option<String>,
}

fn btree() -> Ident {
    Ident::new("btree").unwrap_or_else(|_| unreachable!("a valid identifier"))
}

/// A function that the flip replaces.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Function {
    /// `schema.name(argument types)`, as PostgreSQL's `regprocedure` reads it. Its old definition is kept for rollback.
    pub signature: String,
    /// SQL file beside `job.toml`: `create or replace function` and comments, grants, revokes on it; nothing else.
    pub file: String,
    /// The file's text; filled by loading, not written in `job.toml`.
    #[serde(default)]
    #[schemars(skip)]
    pub statements: Vec<String>,
}

/// The policies of the target before and after. Every policy on the table must be in `replace` or `keep`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policies {
    /// Names of policies that the flip drops.
    pub replace: Vec<String>,
    /// Names of policies that stay as they are.
    #[serde(default)]
    pub keep: Vec<String>,
    /// Policies that the flip creates.
    pub create: Vec<Policy>,
}

/// A row level security policy.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    /// Policy name.
    #[schemars(with = "String")]
    pub name: Ident,
    /// The command it is for.
    pub command: PolicyCommand,
    /// Roles it is for; `public` means everyone.
    #[schemars(with = "Vec<String>")]
    pub roles: Vec<Ident>,
    /// Permissive policies are ORed; restrictive ones are ANDed.
    #[serde(default = "yes")]
    pub permissive: bool,
    /// USING expression over the target's bare columns.
    #[serde(default)]
    pub using: Option<String>,
    /// WITH CHECK expression over the target's bare columns.
    #[serde(default)]
    pub check: Option<String>,
}

fn yes() -> bool {
    true
}

/// The command of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PolicyCommand {
    /// All commands.
    All,
    /// SELECT.
    Select,
    /// INSERT.
    Insert,
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
}

impl PolicyCommand {
    /// The keyword in SQL, lower case.
    pub fn sql(self) -> &'static str {
        match self {
            Self::All => "all",
            Self::Select => "select",
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
        }
    }

    /// `pg_policy.polcmd`.
    pub fn catalog_code(self) -> &'static str {
        match self {
            Self::All => "*",
            Self::Select => "r",
            Self::Insert => "a",
            Self::Update => "w",
            Self::Delete => "d",
        }
    }
}

/// Another path to the same value. A target row for which the paths disagree blocks the flip: with the old policies on
/// one path and the new column on the other, somebody's access would silently change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Agree {
    /// What people call this path.
    pub name: String,
    /// The joins of this path; as `source`.
    pub source: Vec<Join>,
    /// The value at the end of this path; compared with the first column's value.
    pub value: String,
}

/// What an UPDATE of the target sets off besides the update, and what shall happen to it during batches.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SideEffects {
    /// `skip`: batches run with `session_replication_role = replica`, so that ordinary triggers do not fire. `fire`:
    /// they fire for every row of a batch. Without an answer, a target that has UPDATE triggers is refused.
    #[serde(default)]
    pub triggers: Option<TriggerMode>,
    /// Names of triggers that may fire although `triggers = "skip"` (they are ENABLE ALWAYS or ENABLE REPLICA).
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub may_fire: Vec<Ident>,
    /// Publications that may carry the batches' updates to their subscribers.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub publications: Vec<Ident>,
    /// Source rows may lack a legal value, now or later. Once NOT NULL or the foreign key is in place, inserting a
    /// target row for such a source row fails with 23502 or 23503.
    #[serde(default)]
    pub source_may_lack_value: bool,
    /// Writers of source tables may use REPEATABLE READ or SERIALIZABLE, where changes of the value raise an error
    /// (docs/trigger-contract.md). `check` warns until this says that the operator knows.
    #[serde(default)]
    pub strict_isolation_raises: bool,
}

/// What the application's triggers do in batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TriggerMode {
    /// They do not fire.
    Skip,
    /// They fire.
    Fire,
}

/// How batches are cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Batching {
    /// How rows are walked. `auto` picks the best that the table allows.
    pub strategy: Strategy,
    /// What a batch should take; the number of rows follows from it. 10 ms to 5 s.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub target_duration: Duration,
    /// Rows of the first batch.
    pub initial_rows: u32,
    /// Fewest rows of a batch.
    pub min_rows: u32,
    /// Most rows of a batch.
    pub max_rows: u32,
    /// Pause after each batch.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub pause: Duration,
    /// Ranges of the table that are filled at the same time, each by a connection of its own; heap order only. Two are
    /// about a third faster than one where the server has the cores, and press on the application accordingly. 1 to 8.
    pub lanes: u32,
    /// How long to wait, once per holder, for a snapshot, replication slot or prepared transaction that keeps dead row versions
    /// from being pruned: while it is there, heap order writes as much as one big UPDATE. At most 1 day.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub horizon_wait: Duration,
    /// A target for the table's growth in heap order; beyond it, `VACUUM` makes room, for time and WAL. 1 to 100.
    pub growth_percent: Option<u32>,
    /// How the WAL of batches is compressed, which is mostly full-page images where checkpoints are frequent. Needs PostgreSQL
    /// 15 and `grant set on parameter wal_compression`, or a superuser. Takes effect with the next connection.
    pub wal_compression: WalCompression,
}

impl Default for Batching {
    fn default() -> Self {
        Self {
            strategy: Strategy::Auto,
            // An application statement that waits for a batch's row waits about this long at most.
            target_duration: Duration::from_millis(100),
            initial_rows: 500,
            min_rows: 10,
            // Bounds the locks and the work that one cancelled batch throws away.
            max_rows: 10_000,
            pause: Duration::ZERO,
            lanes: 1,
            // Longer than a request or a report on a dashboard, shorter than anybody's patience with a job that stands still.
            horizon_wait: Duration::from_secs(60),
            growth_percent: None,
            wal_compression: WalCompression::Auto,
        }
    }
}

/// Compression of full-page images in the WAL that batches write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WalCompression {
    /// `lz4` where the login may set it and the server has it, else the server's own setting: a third to a half less WAL
    /// for a twentieth to a tenth more time.
    #[default]
    Auto,
    /// The server's own setting.
    Server,
    /// None.
    Off,
    /// LZ4.
    Lz4,
    /// PostgreSQL's own method: slower than LZ4, no smaller.
    Pglz,
    /// Zstandard: a sixth less than LZ4, and slower.
    Zstd,
}

/// How rows are walked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// The best that the table allows.
    #[default]
    Auto,
    /// In the order of the heap, in rounds: least WAL, least growth. Ordinary heap tables.
    Heap,
    /// By key, with row comparison: works for every table.
    Keyset,
}

/// A phase that can be held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum HoldPoint {
    /// Before the first batch.
    Backfill,
    /// Before index, foreign key and NOT NULL.
    Constrain,
    /// Before policies and functions change.
    Flip,
}

impl fmt::Display for ColumnRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.alias.sql(), self.column.sql())
    }
}

impl std::str::FromStr for ColumnRef {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let parts: [Ident; 2] = crate::pg::ident::split_qualified(s)?
            .try_into()
            .map_err(|_| format!("expected alias.column such as t.conversation_id, found {s:?}"))?;
        let [alias, column] = parts;
        Ok(Self { alias, column })
    }
}

macro_rules! serde_as_text {
    ($type:ty, $to:expr, $from:expr) => {
        impl Serialize for $type {
            fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
                let to: fn(&$type) -> String = $to;
                s.serialize_str(&to(self))
            }
        }
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
                let text = String::deserialize(d)?;
                let from: fn(&str) -> Result<$type, String> = $from;
                from(&text).map_err(serde::de::Error::custom)
            }
        }
    };
}
serde_as_text!(Ident, |i| i.as_str().to_owned(), |s| Ident::new(s));
serde_as_text!(QualifiedName, QualifiedName::sql, |s| s.parse());
serde_as_text!(ColumnRef, ColumnRef::to_string, |s| s.parse());

/// The JSON Schema of `job.toml`; `docs/job.schema.json` is this.
pub fn json_schema() -> serde_json::Value {
    schemars::schema_for!(JobSpec).to_value()
}
