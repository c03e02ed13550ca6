//! What a planted defect is.

/// When it is planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Moment {
    /// Before the job starts, in the database.
    Before,
    /// In the job itself, before it starts.
    Job,
    /// While the job is held before the flip: everything is filled, verified and compared.
    Held,
    /// Between the flip and the comparison after it.
    Flipped,
    /// After the flip, under the watch.
    Watched,
}

impl Moment {
    pub const ALL: [Self; 5] = [Self::Before, Self::Job, Self::Held, Self::Flipped, Self::Watched];

    /// Heading in the document.
    pub fn heading(self) -> &'static str {
        match self {
            Self::Before => "In the database, before the job starts",
            Self::Job => "In the job",
            Self::Held => "While the job is held before the flip",
            Self::Flipped => "Between the flip and the comparison after it",
            Self::Watched => "After the flip, under the watch",
        }
    }
}

/// Who has to catch it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// `check` refuses, so the job does not start.
    Check,
    /// `check` remarks it: a warning, with what to do.
    Remark,
    /// The job is refused when it is read.
    Load,
    /// The comparison of access before the flip.
    Comparison,
    /// The comparison of access after the flip, which takes the flip back.
    ComparisonAfter,
    /// The verification of rows and sync triggers, by `verify` and by the daemon before it goes on.
    Verification,
    /// The flip, which goes back to the verification or refuses.
    Flip,
    /// The watch.
    Watch,
    /// Nobody needs to: it has no effect, which is what is tested.
    Harmless,
    /// Nobody does, for the reason given.
    Nobody(&'static str),
}

impl By {
    /// As the document has it.
    pub fn text(self) -> String {
        match self {
            Self::Check => "`check`".into(),
            Self::Remark => "`check` (remark)".into(),
            Self::Load => "reading the job".into(),
            Self::Comparison => "access comparison before the flip".into(),
            Self::ComparisonAfter => "access comparison after the flip, which takes it back".into(),
            Self::Verification => "`verify`".into(),
            Self::Flip => "the flip".into(),
            Self::Watch => "watch".into(),
            Self::Harmless => "without effect".into(),
            Self::Nobody(why) => format!("**not caught**: {why}"),
        }
    }
}

/// A defect.
#[derive(Debug, Clone, Copy)]
pub struct Defect {
    /// What is wrong, for people.
    pub name: &'static str,
    /// When it is planted.
    pub moment: Moment,
    /// SQL of a superuser. `{role}` is a role of the defect's own, `{user}` and `{other}` are two users.
    pub sql: &'static str,
    /// Changes of `job.toml` (or, with `-- ` in front of the old text, of `add_message.sql`): old text, new text.
    pub job: &'static [(&'static str, &'static str)],
    /// Who catches it.
    pub by: By,
    /// What is said then.
    pub says: &'static str,
}

/// A defect in the database.
pub const fn sql(name: &'static str, moment: Moment, by: By, says: &'static str, sql: &'static str) -> Defect {
    Defect { name, moment, sql, job: &[], by, says }
}

/// A defect in the job.
pub const fn job(
    name: &'static str,
    by: By,
    says: &'static str,
    job: &'static [(&'static str, &'static str)],
) -> Defect {
    Defect { name, moment: Moment::Job, sql: "", job, by, says }
}
