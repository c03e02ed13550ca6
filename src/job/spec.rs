//! The types of `job.toml`. `docs/job.schema.json` is generated from them, and a test keeps it so.

use std::collections::BTreeMap;
use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pg::ident::{Ident, QualifiedName};

pub use super::batching::{Batching, Strategy, WalCompression};
pub use super::policies::{Policies, Policy, PolicyCommand};
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
    /// type outside `pg_catalog` with its schema, and functions IMMUTABLE: what they read elsewhere could change unnoticed.
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
