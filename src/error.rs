//! The one error type. A leaf: it knows no other module.
//!
//! `Display` prints what went wrong in one line and never its source; the chain is rendered once, by
//! [`Error::render`], where the error is handled.

use std::fmt;

/// What kind of failure this is. It decides the exit code and what a caller may do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Wrong command line, settings or job file. Nothing was done.
    Input,
    /// A preflight check failed.
    Check,
    /// The server cannot be reached, or refuses us.
    Connect,
    /// The state of the job or the database does not allow this now.
    Refused,
    /// Another daemon holds the lease, so nothing of ours may commit.
    LeaseLost,
    /// A shutdown was asked for; what was in flight has been rolled back or finished.
    Interrupted,
    /// The server rejected a statement.
    Database,
    /// The work was done, and the result is not what it must be.
    Failed,
    /// A bug or an operating system failure.
    Internal,
}

impl Kind {
    /// The process exit code; the table is in README.md and printed by `backfilld --help`.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed | Self::Database | Self::Internal => 1,
            Self::Input => 2,
            Self::Check => 3,
            Self::Connect => 4,
            Self::Refused => 5,
            Self::LeaseLost => 6,
            Self::Interrupted => 130,
        }
    }
}

/// An error with what a person needs: what happened, where, why, and what to do next.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    message: String,
    hint: Option<String>,
    sqlstate: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// `std::result::Result` with our [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind`; `message` is one lower-case line without final period.
    pub fn new(kind: Kind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, sqlstate: None, source: None }
    }

    /// Wrong input: command line, settings, job file.
    pub fn input(message: impl Into<String>) -> Self {
        Self::new(Kind::Input, message)
    }

    /// The state does not allow it.
    pub fn refused(message: impl Into<String>) -> Self {
        Self::new(Kind::Refused, message)
    }

    /// The work came out wrong.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Kind::Failed, message)
    }

    /// A bug or an operating system failure.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Kind::Internal, message)
    }

    /// Adds what to do next.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Adds the server's SQLSTATE, five characters.
    #[must_use]
    pub fn with_sqlstate(mut self, sqlstate: impl Into<String>) -> Self {
        self.sqlstate = Some(sqlstate.into());
        self
    }

    /// Says what was being done: `context: message`.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }

    /// The same, as the operator's mistake: a server's complaint about what the operator wrote.
    #[must_use]
    pub fn into_input(mut self) -> Self {
        if self.kind == Kind::Database {
            self.kind = Kind::Input;
        }
        self
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The server's SQLSTATE, if the server spoke.
    pub fn sqlstate(&self) -> Option<&str> {
        self.sqlstate.as_deref()
    }

    /// What to do next, if known.
    pub fn hint(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// Message, causes and SQLSTATE on one line, without the hint.
    pub fn line(&self) -> String {
        let mut out = self.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            let text = cause.to_string();
            if !out.contains(&text) {
                out.push_str(&format!(": {text}"));
            }
            next = cause.source();
        }
        if let Some(state) = &self.sqlstate {
            out.push_str(&format!(" (SQLSTATE {state})"));
        }
        out
    }

    /// [`Self::line`] for where no value of a row may be: what the server says about a row's content can quote it.
    pub fn line_without_values(&self) -> String {
        match &self.sqlstate {
            Some(state) if is_about_a_row(state) => format!("{} (SQLSTATE {state})", meaning(state)),
            _ => self.line(),
        }
    }

    /// The whole story for a terminal: message, SQLSTATE, causes, hint; several lines, no final newline.
    pub fn render(&self) -> String {
        let mut out = format!("error: {}", self.message);
        if let Some(state) = &self.sqlstate {
            out.push_str(&format!("\n  SQLSTATE: {state}"));
        }
        let mut last = self.message.clone();
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            let text = cause.to_string();
            if !last.contains(&text) {
                out.push_str(&format!("\n  cause: {text}"));
            }
            last = text;
            next = cause.source();
        }
        if let Some(hint) = &self.hint {
            for (i, line) in hint.lines().enumerate() {
                out.push_str(if i == 0 { "\n  hint: " } else { "\n        " });
                out.push_str(line);
            }
        }
        out
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| &**s as &(dyn std::error::Error + 'static))
    }
}

/// What a loop may do about a failed database call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// Roll back, wait, try again with a smaller batch.
    Smaller,
    /// The connection is gone; connect again and read durable state before anything else.
    Reconnect,
    /// Needs a human.
    Never,
}

/// SQLSTATE to retry class. The default is "needs a human".
/// Codes: PostgreSQL documentation, appendix A.
pub fn retry_class(sqlstate: &str) -> Retry {
    match sqlstate {
        // deadlock_detected, serialization_failure, lock_not_available, query_canceled (statement_timeout)
        "40P01" | "40001" | "55P03" | "57014" => Retry::Smaller,
        // 25P03/25P04: idle-in-transaction and transaction timeout end the session
        // 25006: the server has become a standby
        "25006" | "25P03" | "25P04" | "57P01" | "57P02" | "57P03" | "57P05" | "53300" => Retry::Reconnect,
        s if s.starts_with("08") => Retry::Reconnect,
        _ => Retry::Never,
    }
}

/// Errors that one row's content can cause: data exceptions, constraint violations, exceptions raised by triggers or by
/// functions in the value.
pub fn is_about_a_row(sqlstate: &str) -> bool {
    ["22", "23", "44", "P0", "21"].iter().any(|class| sqlstate.starts_with(class))
}

/// Names of SQLSTATEs: PostgreSQL documentation, appendix A.
pub fn meaning(sqlstate: &str) -> &'static str {
    match sqlstate {
        "23502" => "violates NOT NULL",
        "23503" => "violates foreign key",
        "23505" => "violates unique constraint",
        "23514" => "violates check constraint",
        "23P01" => "violates exclusion constraint",
        "P0001" => "a trigger or function raised an exception",
        "22001" => "the value is too long for its type",
        "22003" => "a number is out of range",
        "22P02" => "the value is not valid for its type",
        s if s.starts_with("22") => "data exception",
        s if s.starts_with("23") => "violates a constraint",
        s if s.starts_with("21") => "the value is not one row",
        s if s.starts_with("44") => "violates the check option of a view",
        _ => "the update raised an error",
    }
}

impl From<tokio_postgres::Error> for Error {
    fn from(error: tokio_postgres::Error) -> Self {
        if let Some(db) = error.as_db_error() {
            let state = db.code().code().to_owned();
            let kind = match state.as_str() {
                "28P01" | "28000" | "3D000" | "53300" | "57P03" => Kind::Connect,
                _ => Kind::Database,
            };
            // `detail` and `where` of the server can hold row values: they are left out.
            let mut e = Self::new(kind, db.message().to_owned()).with_sqlstate(state);
            if let Some(hint) = db.hint() {
                e = e.with_hint(hint.to_owned());
            }
            return e;
        }
        let closed = error.is_closed();
        let mut cause: Vec<String> = Vec::new();
        let mut next = std::error::Error::source(&error);
        while let Some(c) = next {
            cause.push(c.to_string());
            next = c.source();
        }
        let mut message = error.to_string();
        for c in cause {
            if !message.contains(&c) {
                message = format!("{message}: {c}");
            }
        }
        let io = std::error::Error::source(&error).is_some_and(|s| s.is::<std::io::Error>());
        Self::new(if closed || io { Kind::Connect } else { Kind::Database }, message)
    }
}

impl Error {
    /// What a loop may do about this error.
    pub fn retry(&self) -> Retry {
        match (&self.sqlstate, self.kind) {
            (Some(state), _) => retry_class(state),
            (None, Kind::Connect) => Retry::Reconnect,
            (None, _) => Retry::Never,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_one_line_and_render_tells_the_chain_once() {
        let io = std::io::Error::new(std::io::ErrorKind::NotFound, "no such file");
        let e = Error::input("cannot read job").with_source(io).with_hint("name a directory\nwith a job.toml");
        assert_eq!(e.to_string(), "cannot read job");
        assert_eq!(
            e.render(),
            "error: cannot read job\n  cause: no such file\n  hint: name a directory\n        with a job.toml"
        );
    }

    #[test]
    fn unknown_sqlstates_need_a_human() {
        assert_eq!(retry_class("23514"), Retry::Never);
        assert_eq!(retry_class("40P01"), Retry::Smaller);
        assert_eq!(retry_class("08006"), Retry::Reconnect);
    }
}
