//! `[access]`: under which roles and users old and new policies are compared.

use std::collections::BTreeMap;
use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::lex;
use super::spec::{JobSpec, TARGET_ALIAS};
use crate::pg::ident::Ident;

/// Stands for the user in `settings`.
pub const USER: &str = "{user}";
/// Stands for the role in `settings`.
pub const ROLE: &str = "{role}";

/// Under which roles and users the old policies and functions are compared with the new ones, before the flip and after it.
/// Without this table a job with policies flips without the comparison, and `check` warns.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// Roles that act for a user: each is compared for the users of the sample, for a stranger, and without a user.
    #[schemars(with = "Vec<String>")]
    pub roles: Vec<Ident>,
    /// Roles that never act for a user.
    #[schemars(with = "Vec<String>")]
    pub anonymous: Vec<Ident>,
    /// Roles that policies do not apply to, and shall not. A role of the other two lists that is above the policies is a
    /// difference: comparing it would prove nothing.
    #[schemars(with = "Vec<String>")]
    pub bypass: Vec<Ident>,
    /// How a user is impersonated: settings for the transaction, with `{user}` and `{role}` in their values. Those with
    /// `{user}` are empty for a role without a user. `search_path` may be among them; the default is the login's own.
    pub settings: BTreeMap<String, String>,
    /// The expression by which policies know the user, such as `auth.uid()`. With it the policies are also compared for all
    /// users at once, by sets. Its type is that of the job's first column.
    pub user: Option<String>,
    /// Query for all users: one column. Default: the distinct values of `source` and of every `agree` path, and those to which
    /// a foreign key of the first column refers.
    pub users: Option<String>,
    /// Users for whom policies are compared as the server enforces them: those with the most rows, some without rows,
    /// everyone that the comparison by sets found, and others up to this number. 1 to 10,000.
    pub sample: u32,
    /// Keys listed per difference. 1 to 1000.
    pub keys: u32,
    /// Try INSERT, UPDATE and DELETE, and `calls`, in transactions that are rolled back.
    pub writes: bool,
    /// What the application's triggers and functions do is undone by a rollback: no calls to the outside, and gaps in
    /// sequences do not matter. `writes` needs it where the target has such triggers, or the job has `calls`.
    pub writes_can_be_undone: bool,
    /// How long one statement of the comparison may take. 100 ms to 1 h.
    #[serde(with = "humantime_serde")]
    #[schemars(with = "String")]
    pub statement_timeout: Duration,
    /// Calls of the job's functions, tried before and after for each user.
    pub calls: Vec<Call>,
    /// Differences that are meant.
    pub accept: Vec<Accept>,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            roles: Vec::new(),
            anonymous: Vec::new(),
            bypass: Vec::new(),
            settings: BTreeMap::new(),
            user: None,
            users: None,
            // An old policy that joins costs about 200 ms per user on a million rows: some seconds in all.
            sample: 24,
            keys: 20,
            writes: true,
            writes_can_be_undone: false,
            statement_timeout: Duration::from_secs(60),
            calls: Vec::new(),
            accept: Vec::new(),
        }
    }
}

/// A call of one of the job's functions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// What people call it.
    pub name: String,
    /// SQL expression over `t`, a row of the target: once one of the user's own, once somebody else's. Functions outside
    /// `pg_catalog` with their schema.
    pub call: String,
}

/// A difference that is meant, because the old policies or functions were wrong.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Accept {
    /// What differs.
    pub command: AccessCommand,
    /// Which attempt, as the report calls it, such as `foreign parent` or the name of a call; default: each.
    #[serde(default)]
    pub attempt: Option<String>,
    /// For this role only; default: for each.
    #[serde(default)]
    #[schemars(with = "Option<String>")]
    pub role: Option<Ident>,
    /// In which direction.
    pub effect: Effect,
    /// Why that is right. It is stored with the result.
    pub reason: String,
}

/// What a user may do or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccessCommand {
    /// Rows that are visible.
    Select,
    /// INSERT.
    Insert,
    /// UPDATE.
    Update,
    /// DELETE.
    Delete,
    /// A call of a function.
    Call,
    /// EXECUTE on a function.
    Execute,
}

impl AccessCommand {
    /// As stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Select => "select",
            Self::Insert => "insert",
            Self::Update => "update",
            Self::Delete => "delete",
            Self::Call => "call",
            Self::Execute => "execute",
        }
    }
}

/// The direction of a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// What was allowed is refused, or fewer rows.
    Narrower,
    /// What was refused is allowed, or more rows.
    Wider,
    /// Both, or another error than before.
    Other,
}

impl Effect {
    /// As stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Narrower => "narrower",
            Self::Wider => "wider",
            Self::Other => "other",
        }
    }
}

impl Access {
    /// SHA-256, in hex, of what the result of a comparison depends on in the job. Differences that are meant can be added
    /// to a job that runs, and make a new comparison necessary.
    pub fn hash(spec: &JobSpec) -> String {
        let json = serde_json::to_string(&spec.access).unwrap_or_default();
        let digest = Sha256::new().chain_update(spec.hash()).chain_update(json).finalize();
        digest.iter().map(|b| format!("{b:02x}")).collect()
    }

    /// The settings for `role` acting for `user`.
    pub fn settings_for(&self, role: &str, user: Option<&str>) -> Vec<(String, String)> {
        let fill = |value: &str| {
            let json = value.trim_start().starts_with('{') && !value.trim_start().starts_with(USER);
            let put = |text: &str| if json { json_escaped(text) } else { text.to_owned() };
            match user {
                Some(user) => value.replace(ROLE, &put(role)).replace(USER, &put(user)),
                None if value.contains(USER) => String::new(),
                None => value.replace(ROLE, &put(role)),
            }
        };
        self.settings.iter().map(|(name, value)| (name.clone(), fill(value))).collect()
    }
}

/// The inside of a JSON string.
fn json_escaped(text: &str) -> String {
    let quoted = serde_json::Value::String(text.to_owned()).to_string();
    quoted[1..quoted.len() - 1].to_owned()
}

/// What is wrong with `[access]`; each a line that names the key.
pub fn problems(spec: &JobSpec) -> Vec<String> {
    let Some(access) = &spec.access else { return Vec::new() };
    let mut out = Vec::new();
    if spec.policies.is_none() && spec.functions.is_empty() {
        out.push("access: the job replaces neither policies nor functions, so there is nothing to compare".to_owned());
    }
    let all: Vec<&Ident> = access.roles.iter().chain(&access.anonymous).chain(&access.bypass).collect();
    if all.is_empty() {
        out.push("access.roles: expected at least one role in roles, anonymous or bypass".into());
    }
    for (i, role) in all.iter().enumerate() {
        if all[..i].contains(role) {
            out.push(format!("access: role {:?} is listed twice", role.as_str()));
        }
        if role.as_str() == "public" {
            out.push("access: \"public\" is everyone, not a role that somebody can be; name the roles".into());
        }
    }
    if !access.roles.is_empty() && !access.settings.values().any(|v| v.contains(USER)) {
        out.push(format!("access.settings: expected a setting with {USER} in it, or every user would be nobody"));
    }
    for name in access.settings.keys() {
        let plain = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '.');
        if name.is_empty() || !plain || (!name.contains('.') && name != "search_path") {
            out.push(format!(
                "access.settings: {name:?} is not a setting of an application (with a dot in its name), nor search_path"
            ));
        }
    }
    if let Some(Err(e)) = access.user.as_deref().map(lex::check_expression) {
        out.push(format!("access.user: {e}"));
    }
    if let Some(query) = &access.users {
        match lex::split_statements(query) {
            Ok(parts) if parts.len() == 1 => {}
            Ok(parts) => out.push(format!("access.users: expected one query, found {} statements", parts.len())),
            Err(e) => out.push(format!("access.users: {e}")),
        }
    }
    numbers(access, &mut out);
    calls(spec, access, &mut out);
    out
}

fn numbers(access: &Access, out: &mut Vec<String>) {
    if !(1..=10_000).contains(&access.sample) {
        out.push(format!("access.sample: expected 1 to 10000, found {}", access.sample));
    }
    if !(1..=1000).contains(&access.keys) {
        out.push(format!("access.keys: expected 1 to 1000, found {}", access.keys));
    }
    if access.statement_timeout < Duration::from_millis(100) || access.statement_timeout > Duration::from_secs(3600) {
        out.push("access.statement_timeout: expected 100ms to 1h".into());
    }
}

fn calls(spec: &JobSpec, access: &Access, out: &mut Vec<String>) {
    for (i, call) in access.calls.iter().enumerate() {
        let path = format!("access.calls[{i}]");
        if let Err(e) =
            lex::check_expression(&call.call).and_then(|()| lex::references(&call.call, &[TARGET_ALIAS]).map(|_| ()))
        {
            out.push(format!("{path}.call: {e}"));
        }
        if access.calls[..i].iter().any(|c| c.name == call.name) || call.name.trim().is_empty() {
            out.push(format!("{path}.name: expected a name of its own, found {:?}", call.name));
        }
    }
    if !access.calls.is_empty() && spec.functions.is_empty() {
        out.push("access.calls: the job replaces no functions, so a call cannot differ".into());
    }
    if !access.calls.is_empty() && access.writes && !access.writes_can_be_undone {
        out.push(
            "access.writes_can_be_undone: expected true, since calls are tried for real and rolled back; say so if \
             nothing that the functions do reaches outside, or set access.writes = false"
                .into(),
        );
    }
    for (i, accept) in access.accept.iter().enumerate() {
        if accept.reason.trim().is_empty() {
            out.push(format!("access.accept[{i}].reason: expected a reason"));
        }
        if let Some(role) = &accept.role
            && !access.roles.iter().chain(&access.anonymous).chain(&access.bypass).any(|r| r == role)
        {
            out.push(format!("access.accept[{i}].role: {:?} is not a role of [access]", role.as_str()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_cannot_leave_the_string_it_is_put_in() {
        let settings = BTreeMap::from([
            ("a.claims".to_owned(), r#"{"sub": "{user}", "role": "{role}"}"#.to_owned()),
            ("a.sub".to_owned(), USER.to_owned()),
            ("a.app".to_owned(), "web".to_owned()),
        ]);
        let access = Access { settings, ..Access::default() };
        let all: BTreeMap<_, _> = access.settings_for("r", Some("x\",\"role\":\"admin")).into_iter().collect();
        let claims: serde_json::Value = serde_json::from_str(&all["a.claims"]).expect("JSON");
        assert_eq!((claims["sub"].as_str(), claims["role"].as_str()), (Some("x\",\"role\":\"admin"), Some("r")));
        assert_eq!(all["a.sub"], "x\",\"role\":\"admin");
        let nobody: BTreeMap<_, _> = access.settings_for("r", None).into_iter().collect();
        assert_eq!((nobody["a.claims"].as_str(), nobody["a.sub"].as_str(), nobody["a.app"].as_str()), ("", "", "web"));
    }
}
