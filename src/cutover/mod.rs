//! Cutover: constrain (index, foreign key, NOT NULL), then flip (policies and functions in one short transaction).
//! Both compare what is there with what the plan wants and do the difference.

pub mod constrain;
pub mod flip;
