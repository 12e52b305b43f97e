use super::*;
use crate::{
    blocking::tests::needs_a_thread,
    coordinator::{score::slice::Part, workers::pool::Home},
    selection::Values,
};
use superbatch_proto::v1::{EmbedDone, EmbeddingDtype, Reason};

const CANDIDATE: Candidate = Candidate {
    source: 0,
    shard: 0,
    block: 0,
    row: 0,
    position: 0,
};

fn slice(number: usize, embeddings: Option<Embeddings>) -> Slice {
    let candidates = vec![CANDIDATE; 4];
    let range = 2 * number..2 * number + 2;
    let mut slice = Slice::new(number, &candidates, range.clone(), range);
    slice.reference = embeddings;
    slice
}

fn two_rows(value: u8) -> Embeddings {
    let bytes = || vec![value; 2 * 2 * 2].into_boxed_slice();
    let part = Part {
        first: 0,
        image: bytes(),
        text: bytes(),
    };
    Embeddings {
        parts: vec![part],
        dim: 2,
        done: EmbedDone {
            not_finite: vec![1],
            ..Default::default()
        },
    }
}

fn scoring(slices: Vec<Slice>) -> Scoring {
    let lease = Duration::from_secs(1);
    Scoring {
        pool: Arc::new(Pool::new(lease, lease, Home::default())),
        job: job(),
        slices,
        candidates: 4,
    }
}

#[test]
fn embeddings_are_joined_off_the_threads_of_calls() {
    let slices = vec![slice(0, Some(two_rows(1))), slice(1, Some(two_rows(2)))];
    let mut scoring = scoring(slices);
    let scored = needs_a_thread(scoring.reference()).unwrap().unwrap();
    let Values::F16(values) = scored.embedded.image else {
        panic!("the job's dtype is f16");
    };
    let bytes: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    assert_eq!(bytes, [[1; 8], [2; 8]].concat());
    assert_eq!(scored.not_finite, [1, 3]);
    let again = needs_a_thread(scoring.reference()).unwrap();
    assert!(again.is_none());
}

#[tokio::test]
async fn a_slice_without_embeddings_is_an_error() {
    let mut scoring = scoring(vec![slice(0, Some(two_rows(1))), slice(1, None)]);
    let error = scoring.reference().await.unwrap_err();
    assert_eq!(error.reason(), Reason::Internal);
}

fn job() -> Job {
    Job {
        run_id: "r".into(),
        generation: 0,
        step: 0,
        manifest_digest: String::new(),
        micro_batch_rows: 2,
        reference: None,
        is_sparse: false,
        learner_model: None,
        reference_dim: None,
        learner_dim: None,
        embedding_dtype: EmbeddingDtype::F16,
        columns: Vec::new(),
        check_only: false,
        form: RowsForm::Whole,
        approximation: None,
    }
}
