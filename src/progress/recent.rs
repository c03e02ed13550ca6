//! The last things that happened in this process: what the log said, kept for whoever looks at the status page.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use serde::Serialize;

/// As many as a page can show.
const KEPT: usize = 60;

/// Something that happened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Event {
    /// When, Unix time in milliseconds.
    pub at_ms: u64,
    /// `info`, `warn` or `error`.
    pub level: String,
    /// What, in a few words.
    pub message: String,
    /// Names and numbers; units are in the names.
    pub fields: serde_json::Map<String, serde_json::Value>,
}

impl Event {
    /// One that the ledger has.
    pub fn recalled(at_ms: i64, kind: String, detail: serde_json::Value) -> Self {
        let fields = match detail {
            serde_json::Value::Object(fields) => fields,
            _ => serde_json::Map::new(),
        };
        Self { at_ms: at_ms.unsigned_abs(), level: "info".into(), message: kind, fields }
    }
}

/// One for the process, as the log is.
static RECENT: Mutex<VecDeque<Event>> = Mutex::new(VecDeque::new());

/// Remembers an event.
pub fn remember(event: Event) {
    let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
    if recent.len() == KEPT {
        recent.pop_front();
    }
    recent.push_back(event);
}

/// Puts what happened before this process in front of what it did itself. `before` is in the order of time.
pub fn seed(before: Vec<Event>) {
    let mut recent = RECENT.lock().unwrap_or_else(PoisonError::into_inner);
    let first = recent.front().map_or(u64::MAX, |e| e.at_ms);
    for event in before.into_iter().rev().filter(|e| e.at_ms < first) {
        if recent.len() < KEPT {
            recent.push_front(event);
        }
    }
}

/// The last events, the newest last.
pub fn events() -> Vec<Event> {
    RECENT.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
}
