//! What a stranger wants to know in ten seconds: is it fine, how far, why does it wait, what can I do. Pure.

use serde::Serialize;

use crate::progress::Snapshot;

/// How it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mood {
    /// Work goes on.
    Ok,
    /// Batches wait, for a reason that ends by itself.
    Waiting,
    /// An operator stopped it, or has to say go; or another daemon does the work.
    Calm,
    /// It needs somebody.
    Attention,
    /// Nothing is left to do.
    Done,
}

/// The same for people.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// How it stands.
    pub mood: Mood,
    /// In one or two words.
    pub label: String,
    /// In a sentence.
    pub headline: String,
    /// Done part of the present phase, 0 to 1, where that can be told.
    pub ratio: Option<f64>,
    /// Rows are walked or compared at this moment, so there is a speed.
    pub moves: bool,
    /// What to do next.
    pub next: Next,
}

/// What an operator can do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Next {
    /// In words.
    pub text: String,
    /// The command to type; empty: none is needed.
    pub command: String,
}

impl Summary {
    /// Of a moment.
    pub fn of(s: &Snapshot) -> Self {
        let (mood, label, headline) = state(s);
        let walks = s.status == "running" && matches!(s.phase.as_str(), "backfill" | "verify");
        let ratio = match s.stored_phase.as_str() {
            // Before the first batch of this process, the checkpoint knows how far it is.
            "backfill" if s.rows_estimate > 0 && s.sweep <= 1 => {
                Some((s.rows_scanned as f64 / s.rows_estimate as f64).clamp(s.ratio, 1.0))
            }
            "backfill" | "verify" => Some(s.ratio),
            "done" => Some(1.0),
            _ => None,
        };
        Self { mood, label: label.into(), headline, ratio, moves: walks, next: next(s) }
    }
}

fn state(s: &Snapshot) -> (Mood, &'static str, String) {
    let because = |text: &str| if s.reason.is_empty() { text.to_owned() } else { s.reason.clone() };
    if s.phase == "standby" {
        return (Mood::Calm, "standby", format!("{}; this daemon takes over if that one ends.", s.note));
    }
    match s.status.as_str() {
        "failed" => (Mood::Attention, "failed", because("it failed")),
        "held" => (Mood::Calm, "held", because("it stands at a hold point")),
        "paused" if s.reason.starts_with("critical") => (Mood::Attention, "paused", because("")),
        "paused" => (Mood::Calm, "paused", because("an operator paused it")),
        "rolling_back" if s.reason.is_empty() => (Mood::Ok, "rolling back", "putting everything back as it was".into()),
        "rolling_back" => (Mood::Attention, "rolling back", s.reason.clone()),
        "rolled_back" => (Mood::Done, "rolled back", "everything is as it was before".into()),
        "done" => (Mood::Done, "done", "the column is filled, proven and in use".into()),
        "running" => running(s),
        _ => (
            Mood::Calm,
            "starting",
            if s.note.is_empty() { "looking whether it can run".into() } else { s.note.clone() },
        ),
    }
}

fn running(s: &Snapshot) -> (Mood, &'static str, String) {
    if let Some(first) = s.waiting.first() {
        return (Mood::Waiting, "waiting", format!("batches wait, and go on by themselves: {}", first.text));
    }
    if s.quarantined > 0 {
        let text = format!("{} rows could not be updated and are in quarantine; they block the flip", s.quarantined);
        return (Mood::Attention, "needs a look", text);
    }
    if s.proofs.iter().any(|p| !p.passed) && s.phase != "backfill" {
        return (Mood::Attention, "needs a look", "the last verification found something".into());
    }
    if s.phase == "watch" && !s.reason.is_empty() {
        return (Mood::Attention, "needs a look", s.reason.clone());
    }
    if s.note.starts_with("waiting") {
        return (Mood::Waiting, "waiting", s.note.clone());
    }
    let text = match s.phase.as_str() {
        "expand" => "adding the column and the triggers that keep it right",
        "backfill" => "filling the column in batches",
        "verify" => "comparing every row with its source",
        "constrain" => "building index and constraints without blocking anybody",
        "flip" => "switching policies and functions over",
        "watch" => "looking whether what the flip left stays as it is",
        _ => "going on",
    };
    (Mood::Ok, "fine", text.into())
}

fn next(s: &Snapshot) -> Next {
    let say = |text: String, command: &str| Next { text, command: format!("backfilld {command} {}", s.job) };
    // A hint often ends with the command, which stands in a line of its own here.
    let ask = |text: &str, command: &str| {
        let next = say(text.to_owned(), command);
        let hint = s.hint.strip_suffix(&next.command).unwrap_or(&s.hint).trim();
        if hint.is_empty() { next } else { Next { text: hint.to_owned(), ..next } }
    };
    if s.phase == "standby" {
        return say(format!("Nothing. {} works on the job; to see how far it is:", s.lease.holder), "status");
    }
    match s.status.as_str() {
        "failed" => ask("Mend the cause, then let it go on:", "resume"),
        "held" => ask("Look at the proof, then let it go on:", "cutover"),
        "paused" => ask("Let it go on:", "resume"),
        "rolled_back" => say("To run it again, forget it first:".into(), "uninstall"),
        "done" => say("Nothing has to be done. To prove the data again, whenever you like:".into(), "verify"),
        "running" if s.quarantined > 0 => say("See which rows, and why:".into(), "quarantine list"),
        "running" => say("Nothing has to be done. To stop after the batch in flight:".into(), "pause"),
        _ => Next { text: "Nothing has to be done.".into(), command: String::new() },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::progress::{LeaseState, Proof, Signal};

    fn at(phase: &str, status: &str) -> Snapshot {
        let shown = if status == "running" { phase } else { status };
        Snapshot {
            job: "j".into(),
            phase: shown.into(),
            stored_phase: phase.into(),
            status: status.into(),
            ..Snapshot::default()
        }
    }

    #[test]
    fn each_state_says_whether_it_is_fine_and_what_to_type() {
        let cases = [
            ("backfill", "running", Mood::Ok, "backfilld pause j"),
            ("constrain", "running", Mood::Ok, "backfilld pause j"),
            ("flip", "held", Mood::Calm, "backfilld cutover j"),
            ("backfill", "paused", Mood::Calm, "backfilld resume j"),
            ("verify", "failed", Mood::Attention, "backfilld resume j"),
            ("flip", "rolling_back", Mood::Ok, ""),
            ("flip", "rolled_back", Mood::Done, "backfilld uninstall j"),
            ("done", "done", Mood::Done, "backfilld verify j"),
            ("", "", Mood::Calm, ""),
        ];
        for (phase, status, mood, command) in cases {
            let summary = Summary::of(&at(phase, status));
            assert_eq!((summary.mood, summary.next.command.as_str()), (mood, command), "{phase} {status}");
            assert!(!summary.headline.is_empty() && !summary.label.is_empty());
        }
    }

    #[test]
    fn what_holds_it_back_is_in_the_headline() {
        let mut s = at("backfill", "running");
        s.waiting = vec![Signal { text: "replica_lag is 12 s, at most 10 s wanted".into(), ..Signal::default() }];
        let summary = Summary::of(&s);
        assert_eq!(summary.mood, Mood::Waiting);
        assert!(summary.headline.contains("replica_lag is 12 s, at most 10 s wanted"), "{}", summary.headline);
        s.waiting.clear();
        s.quarantined = 3;
        assert_eq!(Summary::of(&s).mood, Mood::Attention);
        let mut s = at("constrain", "running");
        s.proofs = vec![Proof { passed: false, ..Proof::default() }];
        assert_eq!(Summary::of(&s).mood, Mood::Attention);
        let mut s = at("watch", "running");
        assert_eq!(Summary::of(&s).mood, Mood::Ok);
        s.reason = "policies: one was dropped".into();
        assert_eq!(Summary::of(&s).mood, Mood::Attention);
        let mut s = at("", "");
        s.phase = "standby".into();
        s.note = "other holds the lease".into();
        s.lease = LeaseState { holder: "other".into(), ..LeaseState::default() };
        assert!(Summary::of(&s).headline.starts_with("other holds the lease"));
    }

    #[test]
    fn a_hint_is_not_said_twice() {
        let mut s = at("flip", "held");
        s.hint = "when you are ready: backfilld cutover j".into();
        let next = Summary::of(&s).next;
        assert_eq!((next.text.as_str(), next.command.as_str()), ("when you are ready:", "backfilld cutover j"));
        s.hint = "backfilld cutover j".into();
        assert_eq!(Summary::of(&s).next.text, "Look at the proof, then let it go on:");
    }

    #[test]
    fn other_commands_of_a_hint_are_said_whole() {
        let mut s = at("backfill", "failed");
        for (hint, text) in [
            (
                "backfilld status j lists keys; correct the data, then: backfilld resume j",
                "backfilld status j lists keys; correct the data, then:",
            ),
            ("backfilld quarantine list j has keys and codes", "backfilld quarantine list j has keys and codes"),
            ("say backfilld rollback j", "say backfilld rollback j"),
        ] {
            s.hint = hint.into();
            let next = Summary::of(&s).next;
            assert_eq!((next.text.as_str(), next.command.as_str()), (text, "backfilld resume j"));
        }
    }

    #[test]
    fn a_daemon_that_begins_at_a_checkpoint_knows_how_far_it_is() {
        let s = Snapshot { rows_scanned: 30, rows_estimate: 100, sweep: 1, ..at("backfill", "running") };
        assert_eq!(Summary::of(&s).ratio, Some(0.3));
        assert_eq!(Summary::of(&at("flip", "running")).ratio, None);
    }
}
