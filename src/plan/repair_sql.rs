//! SQL that derives wrong rows anew, in two statements of one transaction (I2): the first locks the rows, the second, whose
//! snapshot is newer than the locks, reads the source. In one statement a row that somebody changes meanwhile would get the
//! value of an old snapshot. Parameters of both: the keys, as a text array for each column of the key.

use super::shape::Shape;

/// Locks the rows, in key order, as everybody of ours does.
pub fn lock(shape: &Shape) -> String {
    let (keys, on) = shape.keys_in();
    format!(
        "select 1 from {keys} join {} as t on {on}\norder by {}\nfor no key update of t",
        shape.target.sql(),
        shape.key_of("t")
    )
}

/// Derives them. A row whose source gives NULL where NOT NULL is wanted stays as it is: NULL would be no better.
pub fn derive(shape: &Shape) -> String {
    let (keys, on) = shape.keys_in();
    let set: Vec<String> =
        shape.columns.iter().map(|c| format!("{} = {}", c.name.sql(), shape.scalar(c, "t"))).collect();
    let wrong: Vec<String> =
        shape.columns.iter().map(|c| c.differs(&format!("t.{}", c.name.sql()), &shape.scalar(c, "t"))).collect();
    let legal: String = shape
        .columns
        .iter()
        .filter(|c| c.not_null)
        .map(|c| format!("\n  and {} is not null", shape.scalar(c, "t")))
        .collect();
    format!(
        "update {} as t set {}\nfrom {keys}\nwhere {on}\n  and ({}){legal}",
        shape.target.sql(),
        set.join(", "),
        wrong.join(" or ")
    )
}

/// Whether each column has a value, of one row: `bool[]`, in the order of the columns. Parameters: the key.
pub fn filled(shape: &Shape) -> String {
    let filled: Vec<String> = shape.columns.iter().map(|c| format!("t.{} is not null", c.name.sql())).collect();
    format!("select array[{}] from {} as t where {}", filled.join(", "), shape.target.sql(), shape.key_at(1))
}
