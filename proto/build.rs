//! Compiles the protocol with protox, so that no protoc is needed.
use prost::Message;
use std::{env, error::Error, fs, path::PathBuf};
use tonic_prost_build::Config;

fn main() -> Result<(), Box<dyn Error>> {
    let files = ["errors", "selection", "worker"].map(|name| format!("superbatch/v1/{name}.proto"));
    println!("cargo:rerun-if-changed=superbatch");
    let descriptors = protox::compile(files, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?).join("superbatch.binpb");
    fs::write(out, descriptors.encode_to_vec())?;
    let mut config = Config::new();
    config.bytes(["."]).enable_type_names();
    tonic_prost_build::configure().compile_fds_with_config(descriptors, config)?;
    Ok(())
}
