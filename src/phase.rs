//! The state machine of a job; pure. The diagram is in ARCHITECTURE.md.

use std::fmt;
use std::str::FromStr;

/// Where a job is. Stored in `backfilld.job.phase`, set by the daemon that holds the lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Checks; nothing has been changed.
    Preflight,
    /// Column and sync triggers, one transaction.
    Expand,
    /// Batches.
    Backfill,
    /// The proof that the data is right.
    Verify,
    /// Index, foreign key, NOT NULL.
    Constrain,
    /// Policies and functions, one transaction.
    Flip,
    /// After the flip, still looking.
    Watch,
    /// Finished.
    Done,
}

impl Phase {
    /// All phases in order.
    pub const ALL: [Self; 8] = [
        Self::Preflight,
        Self::Expand,
        Self::Backfill,
        Self::Verify,
        Self::Constrain,
        Self::Flip,
        Self::Watch,
        Self::Done,
    ];

    /// The phase that follows when this one is complete.
    pub fn next(self) -> Self {
        let at = Self::ALL.iter().position(|p| *p == self).unwrap_or(0);
        *Self::ALL.get(at + 1).unwrap_or(&Self::Done)
    }

    /// Stable name, as stored and as shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Preflight => "preflight",
            Self::Expand => "expand",
            Self::Backfill => "backfill",
            Self::Verify => "verify",
            Self::Constrain => "constrain",
            Self::Flip => "flip",
            Self::Watch => "watch",
            Self::Done => "done",
        }
    }

    /// Whether entering this phase needs a passing verdict (I6).
    pub fn needs_verdict(self) -> bool {
        matches!(self, Self::Constrain | Self::Flip)
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Phase {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|p| p.as_str() == s).ok_or_else(|| format!("unknown phase {s:?}"))
    }
}

/// Whether and why a job moves. Stored in `backfilld.job.status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Status {
    /// A daemon may work on it. Set by the daemon, and by `resume` and `cutover`.
    Running,
    /// An operator said `pause`. The phase is kept.
    Paused,
    /// A hold point of the job; `cutover` releases it. Set by the daemon.
    Held,
    /// Something needs a human; `resume` tries again. Set by the daemon; survives restarts.
    Failed,
    /// An operator said `rollback`; it goes on until it is done. Set by `rollback`.
    RollingBack,
    /// Everything is as it was before. Set by whoever finished the rollback.
    RolledBack,
    /// Finished. Set by the daemon.
    Done,
}

impl Status {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Running, Self::Paused, Self::Held, Self::Failed, Self::RollingBack, Self::RolledBack, Self::Done];

    /// Stable name, as stored and as shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Held => "held",
            Self::Failed => "failed",
            Self::RollingBack => "rolling_back",
            Self::RolledBack => "rolled_back",
            Self::Done => "done",
        }
    }

    /// Whether the daemon has nothing more to do for this job.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::RolledBack)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Status {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|p| p.as_str() == s).ok_or_else(|| format!("unknown status {s:?}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_leads_to_done() {
        let mut phase = Phase::Preflight;
        for _ in 0..Phase::ALL.len() {
            assert_eq!(phase.as_str().parse::<Phase>(), Ok(phase));
            phase = phase.next();
        }
        assert_eq!(phase, Phase::Done);
    }

    #[test]
    fn nothing_enforcing_comes_before_verify() {
        assert!(Phase::ALL.iter().filter(|p| p.needs_verdict()).all(|p| *p > Phase::Verify));
    }
}
