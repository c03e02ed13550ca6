//! `[policies]`: row level security before the flip and after it.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pg::ident::Ident;

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
