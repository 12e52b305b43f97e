//! The parts from which a run is built.
use super::limits::Limits;
use crate::{
    coordinator::{
        facts::{incarnations::Incarnations, owner::Ownership, run::ModelFact},
        plan::planner::Plan,
        receipts::store::Receipts,
        select::Selector,
        serve::ready::Budget,
        trainer::sizing::Sizing,
        weights::Weights,
        workers::pool::Pool,
    },
    dataset::{Manifest, Scores},
    storage::Location,
};
use arrow::datatypes::SchemaRef;
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

/// The parts of a run that never change.
pub struct Parts {
    pub id: String,
    pub deps: Deps,
    pub location: Location,
    pub manifest: Arc<Manifest>,
    pub manifest_digest: String,
    pub output_schema: SchemaRef,
    pub plan: Plan,
    pub reference: Option<ModelFact>,
    pub learner: Option<ModelFact>,
    pub weights: Weights,
    pub receipts: Receipts,
    pub owner: Ownership,
    pub incarnations: Incarnations,
    /// Score columns of the data.
    pub scores: Scores,
    /// Phases that the run was opened with; the others were appended.
    pub opened_phases: usize,
}
