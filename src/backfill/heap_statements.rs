//! The statements of a walk in heap order, and their parameters.

use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, Statement};

use super::heap_cursor::Slice;
use crate::context::Context;
use crate::error::Result;
use crate::ledger::{heap, lease};
use crate::plan::heap_sql;

/// The batch's statement under a name that EXPLAIN can use.
const NAME: &str = "backfilld_fill";

/// Prepared once per connection.
pub(super) struct Statements {
    pub(super) fence: Statement,
    pub(super) fill: Statement,
    pub(super) advance: Statement,
    pub(super) unfilled: Statement,
    pub(super) fill_row: Statement,
}

impl Statements {
    /// # Errors
    /// What the server says about the job's expressions.
    pub(super) async fn prepare(ctx: &Context, client: &Client) -> Result<Self> {
        let shape = &ctx.facts.shape;
        let named = format!("prepare {NAME} (text, text, int4, int4) as {}", heap_sql::fill(shape));
        client.batch_execute(&named).await?;
        Ok(Self {
            fence: client.prepare(lease::FENCE).await?,
            fill: client.prepare(&heap_sql::fill(shape)).await?,
            advance: client.prepare(heap::ADVANCE).await?,
            unfilled: client.prepare(&heap_sql::unfilled(shape)).await?,
            fill_row: client.prepare(&heap_sql::fill_row(shape)).await?,
        })
    }
}

/// A slice as statement parameters.
pub(super) struct Bounds {
    low: String,
    high: String,
    rounds: i32,
    round: i32,
}

impl Bounds {
    pub(super) fn of(slice: Slice) -> Self {
        Self {
            low: format!("({},0)", slice.low),
            high: format!("({},0)", slice.high),
            rounds: slice.rounds as i32,
            round: slice.round as i32,
        }
    }

    /// The same plan as that of the prepared statement, for EXPLAIN.
    pub(super) fn execute(&self) -> String {
        format!("execute {NAME} ('{}', '{}', {}, {})", self.low, self.high, self.rounds, self.round)
    }

    pub(super) fn params(&self) -> [&(dyn ToSql + Sync); 4] {
        [&self.low, &self.high, &self.rounds, &self.round]
    }
}
