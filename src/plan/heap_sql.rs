//! SQL of batches in heap order.

use super::batch_sql;
use super::shape::Shape;

/// The rows of a slice, as a condition on `t`. Parameters: first page and page behind the last as TIDs (`text`), rounds - 1
/// (`int4`), round (`int4`).
///
/// A TID range scan: it reads just these pages, and, unlike a fetch by single TIDs, prunes them on the way, which is
/// what makes room for HOT updates. `tidsend` is block and line pointer in network order; its last byte modulo a power of
/// two up to 16 is the line pointer's. It costs 0.1 us per row, against 0.75 us for taking the number out of the text form.
pub const SLICE: &str = "t.ctid >= ($1::text)::tid and t.ctid < ($2::text)::tid \
     and get_byte(tidsend(t.ctid), 5) & $3::int4 = $4::int4";

/// One row, by its TID (`text`).
pub const ROW: &str = "t.ctid = ($1::text)::tid";

/// Fills a slice.
pub fn fill(shape: &Shape) -> String {
    batch_sql::fill(shape, SLICE)
}

/// See [`batch_sql::recheck`].
pub fn recheck(shape: &Shape) -> Option<String> {
    batch_sql::recheck(shape, SLICE)
}

/// TID and key, as text, of the unfilled rows of a slice.
pub fn unfilled(shape: &Shape) -> String {
    let null: Vec<String> = shape.columns.iter().map(|c| format!("t.{} is null", c.name.sql())).collect();
    format!(
        "select t.ctid::text, {} from {} as t where {SLICE} and ({})",
        shape.key_as_text("t"),
        shape.target.sql(),
        null.join(" or ")
    )
}

/// Fills one row.
pub fn fill_row(shape: &Shape) -> String {
    batch_sql::fill(shape, ROW)
}
