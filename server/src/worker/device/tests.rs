use super::*;
use crate::{
    fidelity::Fidelity,
    storage::{Location, StorageConfig, Stores},
    worker::model::{ModelFolder, Normalisation, Snapshot, init, snapshot},
};
use bytes::Bytes;
use safetensors::Dtype;
use superbatch_proto::v1::EmbeddingDtype;

const CONFIG: &str = r#"{"model_type": "siglip",
    "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                      "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
    "text_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "vocab_size": 11, "max_position_embeddings": 5}}"#;

async fn location() -> Location {
    let location = Stores::new(StorageConfig::default())
        .open("memory:///tiny")
        .unwrap();
    for (file, content) in [
        ("config.json", CONFIG),
        ("preprocessor_config.json", "{}"),
        ("tokenizer.json", "{}"),
    ] {
        location.put(file, Bytes::from(content)).await.unwrap();
    }
    location
}

async fn folder() -> Arc<ModelFolder> {
    Arc::new(ModelFolder::fetch(&location().await).await.unwrap())
}

fn request(folder: &Arc<ModelFolder>, weights: Weights) -> LoadModel {
    LoadModel {
        folder: folder.clone(),
        weights,
        compute: Compute::F32,
        canary: true,
    }
}

fn batch(model: &ModelKey, rows: usize) -> MicroBatch {
    MicroBatch {
        model: model.clone(),
        fidelity: Fidelity::Full,
        keys: (0..rows as u64).collect(),
        pixels: (0..rows * 8 * 8 * 3).map(|i| (i * 7 % 251) as u8).collect(),
        grids: Vec::new(),
        normalisation: Normalisation {
            rescale: 1.0 / 255.0,
            mean: [0.5; 3],
            std: [0.5; 3],
        },
        ids: (0..rows * 5).map(|i| (i % 11) as i64).collect(),
        dtype: EmbeddingDtype::F32,
    }
}

fn floats(bytes: &Bytes) -> Vec<f32> {
    bytes
        .chunks_exact(4)
        .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
        .collect()
}

/// The initial weights of `seed`, as a file in which `name` is made by `change`.
fn changed(folder: &ModelFolder, seed: u64, name: &str, change: impl Fn(usize) -> f32) -> Bytes {
    let parameters = folder.config.parameters();
    let good = Snapshot::parse(vec![init::random(&parameters, seed).unwrap()]).unwrap();
    let rows: Vec<_> = parameters
        .iter()
        .map(|(of, parameter)| {
            let made = (0..parameter.shape.iter().product())
                .flat_map(|i| change(i).to_le_bytes())
                .collect();
            (
                of,
                parameter.shape.as_slice(),
                if of == name {
                    made
                } else {
                    good.get(of).unwrap().bytes.to_vec()
                },
            )
        })
        .collect();
    snapshot::write(
        rows.iter()
            .map(|(name, shape, bytes)| (*name, Dtype::F32, *shape, bytes.as_slice())),
    )
    .unwrap()
}

#[test]
fn a_device_that_is_not_there_is_refused() {
    assert_eq!(Device::start("cpu", 1).unwrap().name(), "cpu");
    let error = Device::start("cuda:999", 1).unwrap_err();
    assert_eq!(
        (error.reason(), error.value("device")),
        (Reason::DeviceUnavailable, Some("cuda:999"))
    );
    assert_eq!(
        Device::start("gpu", 1).unwrap_err().reason(),
        Reason::InvalidArgument
    );
}

#[tokio::test]
async fn embeddings_have_length_one_and_do_not_depend_on_their_neighbours() {
    let device = Device::start("cpu", 1).unwrap();
    let info = device
        .load(request(&folder().await, Weights::Random(3)))
        .await
        .unwrap();
    assert_eq!(
        (info.embedding_dim, info.image_size, info.text_length),
        (16, 8, 5)
    );
    assert_eq!((info.logit_scale, info.logit_bias), (1.0, Some(0.0)));
    let one = device.embed(batch(&info.key, 1)).await.unwrap();
    let three = device.embed(batch(&info.key, 3)).await.unwrap();
    let half = device
        .embed(MicroBatch {
            dtype: EmbeddingDtype::F16,
            ..batch(&info.key, 3)
        })
        .await
        .unwrap();
    assert!(three.not_finite.is_empty() && three.seconds > 0.0);
    for (one, three, half) in [
        (&one.image, &three.image, &half.image),
        (&one.text, &three.text, &half.text),
    ] {
        let (one, three) = (floats(one), floats(three));
        assert_eq!(
            (one.len(), three.len(), half.len()),
            (16, 3 * 16, 3 * 16 * 2)
        );
        for row in three.chunks_exact(16) {
            assert!((row.iter().map(|x| x * x).sum::<f32>() - 1.0).abs() < 1e-5);
        }
        assert!(one.iter().zip(&three).all(|(a, b)| (a - b).abs() < 1e-5));
        let half = half
            .chunks_exact(2)
            .map(|b| half::f16::from_le_bytes(b.try_into().unwrap()));
        assert!(
            half.zip(&three).all(|(a, b)| a == half::f16::from_f32(*b)),
            "rounded to nearest"
        );
    }
    assert_ne!(three.image, three.text);
}

#[tokio::test]
async fn weights_are_loaded_once_and_the_least_recent_model_leaves() {
    let device = Device::start_keeping("cpu", 1, 2).unwrap();
    let folder = folder().await;
    let load = async |weights| device.load(request(&folder, weights)).await.unwrap();
    let (a, b) = (
        load(Weights::Random(1)).await,
        load(Weights::Random(2)).await,
    );
    assert_ne!(
        (&a.digest, &a.weights_digest),
        (&b.digest, &b.weights_digest)
    );
    assert_eq!(load(Weights::Random(1)).await, a);
    // A push of the same numbers is other weights by name, and the same embeddings.
    let file = init::random(&folder.config.parameters(), 1).unwrap();
    let pushed = load(Weights::Safetensors(file.clone())).await;
    assert_eq!(pushed.weights_digest, blake3::hash(&file).to_hex().as_str());
    let error = device.embed(batch(&b.key, 1)).await.unwrap_err();
    assert_eq!(
        error.reason(),
        Reason::WeightsMissing,
        "a was used after b, so b left"
    );
    let refused = changed(&folder, 1, "logit_scale", |_| 1e6);
    assert!(
        device
            .load(request(&folder, Weights::Safetensors(refused)))
            .await
            .is_err(),
        "and takes nobody's place"
    );
    let embedded = |info: &ModelInfo| device.embed(batch(&info.key, 2));
    assert_eq!(
        embedded(&a).await.unwrap().image,
        embedded(&pushed).await.unwrap().image
    );
}

#[tokio::test]
async fn a_folders_own_weights_are_checked_too() {
    let device = Device::start("cpu", 1).unwrap();
    let location = location().await;
    let folder = Arc::new(ModelFolder::fetch(&location).await.unwrap());
    let error = device
        .load(request(&folder, Weights::Folder))
        .await
        .unwrap_err();
    assert_eq!(
        (error.reason(), error.value("file")),
        (Reason::ModelInvalid, Some("model.safetensors"))
    );
    location
        .put(
            "model.safetensors",
            changed(&folder, 1, "logit_bias", |_| f32::NAN),
        )
        .await
        .unwrap();
    let error = device
        .load(request(&folder, Weights::Folder))
        .await
        .unwrap_err();
    assert_eq!(
        (error.reason(), error.value("tensor")),
        (Reason::ModelInvalid, Some("logit_bias"))
    );
    location
        .put(
            "model.safetensors",
            changed(&folder, 1, "logit_bias", |_| -10.0),
        )
        .await
        .unwrap();
    let info = device
        .load(request(&folder, Weights::Folder))
        .await
        .unwrap();
    assert_eq!(info.logit_bias, Some(-10.0));
    location.delete("model.safetensors").await.unwrap();
    assert_eq!(
        device
            .load(request(&folder, Weights::Folder))
            .await
            .unwrap(),
        info,
        "they are here already"
    );
}

#[tokio::test]
async fn what_overflows_in_use_is_refused_by_the_canary() {
    let device = Device::start("cpu", 1).unwrap();
    let folder = folder().await;
    let huge = changed(
        &folder,
        1,
        "vision_model.embeddings.patch_embedding.weight",
        |_| 3e38,
    );
    let error = device
        .load(request(&folder, Weights::Safetensors(huge.clone())))
        .await
        .unwrap_err();
    assert_eq!(
        (error.reason(), error.value("tensor")),
        (Reason::WeightsRefused, None)
    );
    assert!(
        error
            .to_string()
            .contains("image embeddings of a canary batch"),
        "{error}"
    );
    let scale = changed(&folder, 1, "logit_scale", |_| 1e6);
    let error = device
        .load(request(&folder, Weights::Safetensors(scale)))
        .await
        .unwrap_err();
    assert_eq!(error.value("tensor"), Some("logit_scale"));
    // Without the canary the rows are holes: zero, and reported.
    let request = LoadModel {
        canary: false,
        ..request(&folder, Weights::Safetensors(huge))
    };
    let info = device.load(request).await.unwrap();
    let embedded = device.embed(batch(&info.key, 2)).await.unwrap();
    assert_eq!(embedded.not_finite, [0, 1]);
    assert!(
        floats(&embedded.image)
            .iter()
            .chain(&floats(&embedded.text))
            .all(|x| *x == 0.0)
    );
}

#[tokio::test]
async fn pixels_and_ids_must_fit_the_model() {
    let device = Device::start("cpu", 1).unwrap();
    let info = device
        .load(request(&folder().await, Weights::Random(1)))
        .await
        .unwrap();
    let good = || batch(&info.key, 2);
    let refused = async |batch| device.embed(batch).await.unwrap_err().reason();
    assert_eq!(
        refused(MicroBatch {
            pixels: vec![0; 5],
            ..good()
        })
        .await,
        Reason::ModelInvalid
    );
    for fidelity in [
        Fidelity::Layers(9),
        Fidelity::Patch(5),
        Fidelity::Resolution(5),
    ] {
        let error = device
            .embed(MicroBatch { fidelity, ..good() })
            .await
            .unwrap_err();
        assert_eq!(error.reason(), Reason::ModelInvalid);
        assert_eq!(error.value("field"), Some(fidelity.field()));
    }
    assert_eq!(
        refused(MicroBatch {
            ids: vec![0; 9],
            ..good()
        })
        .await,
        Reason::TokenizerMismatch
    );
    assert_eq!(
        refused(MicroBatch {
            ids: vec![11; 10],
            ..good()
        })
        .await,
        Reason::TokenizerMismatch
    );
    assert_eq!(
        refused(MicroBatch {
            ids: vec![-1; 10],
            ..good()
        })
        .await,
        Reason::TokenizerMismatch
    );
    assert_eq!(
        refused(MicroBatch {
            keys: vec![],
            pixels: vec![],
            ids: vec![],
            ..good()
        })
        .await,
        Reason::InvalidArgument
    );
}

#[tokio::test]
async fn abandoned_work_is_skipped() {
    let device = Device::start("cpu", 1).unwrap();
    let (started, has_started) = oneshot::channel();
    let (open, gate) = std_mpsc::channel::<()>();
    let hold = device.clone();
    let holding = tokio::spawn(async move {
        let wait = move |_| {
            started.send(()).unwrap();
            gate.recv().unwrap();
        };
        hold.run(wait).await
    });
    has_started.await.unwrap();
    let (flag, witness) = oneshot::channel();
    {
        let abandoned = device.run(move |_| flag.send(()).unwrap());
        tokio::pin!(abandoned);
        // One poll puts it in the queue; then its caller goes.
        assert!(futures::poll!(abandoned).is_pending());
    }
    open.send(()).unwrap();
    holding.await.unwrap().unwrap();
    assert_eq!(
        device.run(|on| on).await.unwrap(),
        tch::Device::Cpu,
        "the queue moves on"
    );
    assert!(witness.await.is_err(), "dropped without having been run");
}

#[tokio::test]
async fn work_that_does_not_end_is_given_up_and_the_device_is_well_again_when_it_does() {
    let device = Device::start("cpu", 1)
        .unwrap()
        .with_deadline(Duration::from_millis(50));
    let mut is_well = device.is_well();
    let (open, gate) = std_mpsc::channel::<()>();
    let (hangs, waits) = tokio::join!(
        device.run(move |_| gate.recv().unwrap()),
        device.run(|_| ())
    );
    for error in [
        hangs.unwrap_err(),
        waits.unwrap_err(),
        device.run(|_| ()).await.unwrap_err(),
    ] {
        assert_eq!(
            (error.reason(), error.value("device")),
            (Reason::DeviceUnavailable, Some("cpu"))
        );
        assert!(error.to_string().contains("0.05 s"), "{error}");
    }
    assert!(!*is_well.borrow_and_update());
    open.send(()).unwrap();
    assert!(is_well.wait_for(|is_well| *is_well).await.is_ok());
}

#[tokio::test]
async fn a_panic_is_an_error_and_not_the_end() {
    let device = Device::start("cpu", 1).unwrap();
    let error = device.run(|_| -> () { panic!("oh no") }).await.unwrap_err();
    assert_eq!(error.reason(), Reason::Internal);
    assert!(error.to_string().contains("oh no"));
    let grad = |_| {
        tch::Tensor::ones([2], (tch::Kind::Float, tch::Device::Cpu))
            .set_requires_grad(true)
            .sum(None)
            .requires_grad()
    };
    assert!(
        !device.run(grad).await.unwrap(),
        "no gradients on the device's thread"
    );
}
