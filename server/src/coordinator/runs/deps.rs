//! What runs share.
use super::limits::Limits;
use crate::coordinator::{
    select::Selector, serve::ready::Budget, trainer::sizing::Sizing, workers::pool::Pool,
};
use std::sync::Arc;

/// The parts of the coordinator that a run uses.
#[derive(Clone)]
pub struct Deps {
    pub pool: Arc<Pool>,
    pub selector: Arc<dyn Selector>,
    pub ready: Arc<Budget>,
    pub limits: Arc<Limits>,
    pub sizing: Arc<Sizing>,
}
