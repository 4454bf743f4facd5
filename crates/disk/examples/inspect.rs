//! Shows what an image would boot: `cargo run --release -p steadfast-disk --example inspect -- IMAGE [UUID|LABEL]`.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;
use steadfast_disk::boot::{DiscoverOptions, discover};
use steadfast_disk::image::{self, ImageOptions};

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let Some(path) = args.next() else {
        eprintln!("usage: inspect IMAGE [UUID|LABEL]");
        return ExitCode::from(2);
    };
    let image = match image::open(Path::new(&path), &ImageOptions::read_only()) {
        Ok(image) => image,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::FAILURE;
        }
    };
    println!("{:#?}", image.info());
    let started = Instant::now();
    let options = DiscoverOptions {
        boot_fs: args.next(),
        ..DiscoverOptions::default()
    };
    match discover(&image, &options) {
        Ok(plan) => {
            println!("{plan:#?}\nfound in {} ms", started.elapsed().as_millis());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
