//! Owners with few rows, a median number of them, and the most: by the first column, once it is filled. Pure.

use super::shape::Shape;

/// Rows that are grouped at most; of larger tables a sample of pages is.
const EXACT_ROWS: f64 = 2_000_000.0;

/// Gives label, value as text, and rows. Parameters: none. `rows_estimate`: of the target.
pub fn owners(shape: &Shape, rows_estimate: f32) -> Option<String> {
    let column = shape.columns.first()?.name.sql();
    let share = EXACT_ROWS / f64::from(rows_estimate.max(1.0));
    let (sample, factor) = if share < 1.0 {
        (format!(" tablesample system ({:.6}) repeatable (1)", share * 100.0), 1.0 / share)
    } else {
        (String::new(), 1.0)
    };
    Some(format!(
        "with owned as (
           select t.{column}::text as owner, count(*) as n from {}{sample} as t where t.{column} is not null group by 1
         ), ranked as (
           select owner, n, row_number() over (order by n, owner) as k, count(*) over () as total from owned
         )
         select v.label, r.owner, (r.n * {factor:.3})::int8
         from ranked r cross join lateral (values ('small', 1 + total / 10), ('median', 1 + total / 2), ('large', total))
           as v(label, k)
         where r.k = v.k
         order by array_position(array['small', 'median', 'large'], v.label)",
        shape.target.sql()
    ))
}
