//! What measurements have in common when they are written down: rows, each a comparison with one peer; the header
//! that says how they came about; the same as a table and as a picture.
//!
//! | module | owns |
//! | --- | --- |
//! | [`row`] | what is written down |
//! | [`header`] | on what machine, and when |
//! | [`table`] | figures for people |
//! | [`markdown`] | figures for a page of documentation |
//! | [`plot`] | figures as a picture |
//! | [`store`] | where they are written |

pub mod header;
pub mod markdown;
pub mod plot;
pub mod row;
pub mod store;
pub mod table;
