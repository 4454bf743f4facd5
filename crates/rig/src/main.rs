//! The `steadfast-rig` program: the rig's command line, and process 1 of the servers and mini guests it simulates.

mod command;

use clap::Parser;
use command::protocol::Ask;
use command::{Cli, ClockAct, Verb, demo, local, remote, setup, supervisor};
use std::process::ExitCode;
use steadfast_rig::{Result, inside};

fn main() -> ExitCode {
    // As process 1 this program is the inside of a machine.
    if std::process::id() == 1 {
        let stage_2 = std::env::args()
            .nth(1)
            .is_some_and(|argument| inside::server::is_stage_2(&argument));
        if stage_2 {
            inside::server::stage_2();
        }
        inside::start();
    }
    match run(Cli::parse().verb) {
        Ok(code) => code,
        Err(e) => {
            eprintln!("steadfast-rig: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    let ask = match verb {
        Verb::Setup => return setup::run().map(|()| ExitCode::SUCCESS),
        Verb::Artifacts { no_debian } => return local::artifacts(!no_debian).map(|()| ExitCode::SUCCESS),
        Verb::Demo(options) => return demo::run(&options),
        Verb::Up(options) => return local::up(&options).map(|()| ExitCode::SUCCESS),
        Verb::Supervise { options } => return supervisor::run(&options).map(|()| ExitCode::SUCCESS),
        Verb::Down => return remote::down().map(|()| ExitCode::SUCCESS),
        Verb::Status { json } => return remote::print_status(json),
        Verb::Shell { server, command } => return remote::shell(&server, &command),
        Verb::Client { command } => return remote::client(&command),
        Verb::Put { server, local, path } => {
            return remote::put(&server, &local, &path).map(|()| ExitCode::SUCCESS);
        }
        Verb::Get { server, path, local } => {
            return remote::get(&server, &path, &local).map(|()| ExitCode::SUCCESS);
        }
        Verb::Start { server } => Ask::Start(server),
        Verb::Kill { server } => Ask::Kill(server),
        Verb::Reboot { server } => Ask::Reboot(server),
        Verb::Freeze { server } => Ask::Freeze(server),
        Verb::Thaw { server } => Ask::Thaw(server),
        Verb::Unplug { server, nic } => Ask::Unplug(server, nic),
        Verb::Plug { server, nic } => Ask::Plug(server, nic),
        Verb::Switch { switch, act } => Ask::Switch(switch, act),
        Verb::Disk { server, act } => Ask::Disk(server, act),
        Verb::Starve { server, percent } => Ask::Starve(server, percent),
        Verb::Clock {
            server,
            act: ClockAct::Jump { seconds },
        } => Ask::Clock(server, (seconds * 1000.0) as i64),
        Verb::Heal => Ask::Heal,
        Verb::Console { server } => Ask::Console(server),
    };
    let said = remote::ask(&ask)?;
    print!("{}", String::from_utf8_lossy(&said));
    Ok(ExitCode::SUCCESS)
}
