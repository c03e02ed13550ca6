//! The trigger contract in words: what each writer sees while the sync triggers are there. docs/trigger-contract.md has
//! the whole table with measurements; `plan` prints this for the job at hand.

use super::shape::{JoinShape, Shape};

/// What writers do, what happens, and which errors it may add for the application.
pub fn lines(shape: &Shape) -> Vec<(String, String)> {
    let target = &shape.target;
    if shape.joins.is_empty() {
        let effect = "the value is derived from the row itself, whatever was sent; no lock, no new error";
        return vec![(format!("insert into {target}, update {target}"), effect.to_owned())];
    }
    let missing = if shape.joins.iter().any(|j| !j.covered) {
        "; 0A000 if the source row is missing, since nobody can tell whether it came after the snapshot"
    } else {
        ""
    };
    let mut out = vec![
        (
            format!("insert into {target} (also COPY, MERGE, ON CONFLICT)"),
            format!(
                "the value is derived by a plain read, whatever was sent; at commit the source row is locked FOR SHARE, \
                 read again, and a change meanwhile is corrected. The commit may wait for a writer of the source row, \
                 bounded by lock_timeout (55P03) and not by statement_timeout. REPEATABLE READ and SERIALIZABLE: 40001 \
                 if the source row was changed since the snapshot{missing}"
            ),
        ),
        (
            format!("update {target}, join columns and key unchanged"),
            "the value is derived by a plain read, whatever was sent; no lock on the source. REPEATABLE READ and \
             SERIALIZABLE: as an insert, if the value changes or may change"
                .to_owned(),
        ),
        (
            format!("update {target}, join columns or key changed"),
            "as an insert: derived, then locked and read again at commit".to_owned(),
        ),
    ];
    if shape.columns.iter().any(|c| c.may_raise()) {
        out.push((
            format!("a value of {target} that cannot be derived"),
            "is NULL, and the server's log has the SQLSTATE; once the column is NOT NULL, the write fails with 23502"
                .to_owned(),
        ));
    }
    out.extend(shape.joins.iter().flat_map(source_lines));
    out.push((
        "a transaction that writes rows of two sources and target rows crosswise with another".to_owned(),
        "can deadlock (40P01) as two transactions that lock two rows in opposite order always can; retry it".to_owned(),
    ));
    out
}

fn source_lines(join: &JoinShape) -> Vec<(String, String)> {
    let table = &join.table;
    let appears = if join.covered { "" } else { ", insert, delete, truncate" };
    let mut out = vec![(
        format!("update{appears} of {table} that changes the value"),
        "the rows that hang on it are locked in key order and updated in the same transaction. READ COMMITTED: may wait \
         for writers of those rows; other levels: 0A000, since rows inserted after the snapshot would be missed"
            .to_owned(),
    )];
    if join.covered && join.replaceable {
        out.push((
            format!("delete and insert of the same row of {table} in one transaction"),
            "as an update, at commit".to_owned(),
        ));
    }
    out
}

/// The contract as SQL comments.
pub fn comment(shape: &Shape) -> String {
    let mut out = String::from("\n-- what writers see from Expand on\n");
    for (operation, effect) in lines(shape) {
        out.push_str(&format!("--   {operation}\n--     {effect}\n"));
    }
    out
}
