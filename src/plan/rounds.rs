//! In how many rounds a window of pages is walked in heap order, before anything was measured; pure.
//! [`crate::backfill::heap_cursor`] has the idea, and what is learned on the way.

/// Most rounds per window. Each costs a look at every row of the page.
pub const MAX_ROUNDS: u32 = 28;
/// Rounds from which more save little on pages with up to 40 rows. Measured on rows of 300 bytes, 28 to a page: +17% heap and
/// 85% HOT updates with 16, +15.0% and 87% with 20, +14.8% and 87% with 28, each four a twentieth slower; by key it is +15.3%.
const ENOUGH_ROUNDS: u32 = 20;

/// Rows per page below which every row moves however they are taken: on pages with one row.
const MOVES_ANYWAY: f64 = 1.5;

/// Rounds of a window to begin with, for a table with this many rows per page. What the first round takes has to move, and its room is
/// what the following rounds live on, so a round should take a small part of a page: with five rows to a page, taking two at
/// once moves two fifths of the table, taking one a fifth. So few rows are taken one by one, in a round more than there are rows,
/// since pages differ and a round that finds nothing costs just a look; many small ones three at a time.
pub fn initial_rounds(rows_per_page: f64) -> u32 {
    if rows_per_page < MOVES_ANYWAY {
        return 1;
    }
    let one_by_one = rows_per_page.min(1000.0).ceil() as u32 + 1;
    rounds_limit(one_by_one.min(ENOUGH_ROUNDS.max(one_by_one / 3)))
}

/// Keeps a number of rounds within what a window may have.
pub fn rounds_limit(rounds: u32) -> u32 {
    rounds.clamp(1, MAX_ROUNDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_takes_a_small_part_of_a_page() {
        assert_eq!(initial_rounds(28.0), 20);
        assert_eq!(initial_rounds(4.9), 6, "one by one");
        assert_eq!(initial_rounds(2.0), 3);
        assert_eq!(initial_rounds(0.5), 1, "a row alone on its page moves however it is taken");
        assert_eq!(initial_rounds(88.0), 28);
        assert_eq!(initial_rounds(1e9), 28);
    }
}
