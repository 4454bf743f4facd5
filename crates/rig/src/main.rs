//! The `steadfast-rig` program: the rig's command line, and process 1 of the servers it simulates.

use std::process::ExitCode;
use steadfast_rig::inside;

fn main() -> ExitCode {
    // As process 1 this program is the inside of a server.
    if std::process::id() == 1 {
        let stage_2 = std::env::args()
            .nth(1)
            .is_some_and(|argument| inside::server::is_stage_2(&argument));
        if stage_2 {
            inside::server::stage_2();
        }
        inside::start();
    }
    let start = std::time::Instant::now();
    let rig = match steadfast_rig::Rig::builder().servers(2).memory_mib(768).start() {
        Ok(rig) => rig,
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("up after {:?}", start.elapsed());
    for command in std::env::args().skip(1) {
        println!("$ {command}\n{:?}", rig.server(0).exec(&command));
    }
    println!(
        "{:?}",
        rig.client().map(|c| c.ping(
            std::net::Ipv4Addr::new(10, 90, 0, 11),
            std::time::Duration::from_secs(2)
        ))
    );
    ExitCode::SUCCESS
}
