//! SQL of batches in heap order.

use super::batch_sql;
use super::shape::Shape;

/// The rows of a slice, as a condition on `t`. Parameters: first page and page behind the last as TIDs (`text`), rounds
/// (`int4`), round (`int4`).
///
/// A TID range scan: it reads just these pages, and, unlike a fetch by single TIDs, prunes them on the way, which is
/// what makes room for HOT updates. `tidsend` is block and line pointer in network order; its last byte, which is the line
/// pointer modulo 256, puts each row into one round. It costs 0.1 us per row, against 0.75 us for taking the number out of
/// the text form.
pub const SLICE: &str = "t.ctid >= ($1::text)::tid and t.ctid < ($2::text)::tid \
     and get_byte(tidsend(t.ctid), 5) % $3::int4 = $4::int4";

/// One row, by its TID (`text`).
pub const ROW: &str = "t.ctid = ($1::text)::tid";

/// Fills a slice, in a transaction that has the fence. It is sent without waiting for the answers to `begin` and to the fence, which
/// locks a row and so has a transaction id: where either of them failed, it does nothing, even outside of a transaction.
pub fn fill(shape: &Shape) -> String {
    batch_sql::fill(shape, &format!("{SLICE} and pg_current_xact_id_if_assigned() is not null"))
}

/// The pages of a chunk, as a condition on `t`. Parameters: first page and page behind the last as TIDs (`text`).
pub const PAGES: &str = "t.ctid >= ($1::text)::tid and t.ctid < ($2::text)::tid";

/// Two statements, for one transaction, that take back what [`fill`] wrote where the source had become NULL by the time
/// the row was locked; see [`batch_sql::recheck`], which says when that can be. It cannot be done in the batch: rows that
/// moved are not in its slice any more. The first locks such rows, so that nobody changes them meanwhile; the second, with a newer
/// snapshot, looks at their source again (I2). `None` where it cannot happen.
pub fn settle(shape: &Shape) -> Option<[String; 2]> {
    let clear = batch_sql::recheck(shape, PAGES)?;
    let lock = format!(
        "select 1 from {} as t\nwhere {PAGES}\n  and ({})\nfor no key update of t",
        shape.target.sql(),
        batch_sql::stale(shape)
    );
    Some([lock, clear])
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
