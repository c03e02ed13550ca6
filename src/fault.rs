//! Points at which the fault tests end the process, as `kill -9` would: `BACKFILLD_FAULT=<point>[:<n>]`, at the n-th
//! pass. Not in release builds. A leaf.

/// Ends the process if this is the point that was asked for.
#[cfg(not(debug_assertions))]
pub(crate) fn point(_name: &str) {}

/// Ends the process if this is the point that was asked for.
#[cfg(debug_assertions)]
pub(crate) fn point(name: &str) {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    static WANTED: OnceLock<Option<(String, AtomicU64)>> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| {
        let text = std::env::var("BACKFILLD_FAULT").ok()?;
        let (name, n) = text.split_once(':').map_or((text.as_str(), 1), |(a, b)| (a, b.parse().unwrap_or(1)));
        Some((name.to_owned(), AtomicU64::new(n)))
    });
    if let Some((wanted, left)) = wanted
        && wanted == name
        && left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        std::process::abort();
    }
}
