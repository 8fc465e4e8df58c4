//! The guide: chapters for those who run fleets of microVMs on dmsnap.

#[doc = include_str!("errors.md")]
pub mod errors {}
