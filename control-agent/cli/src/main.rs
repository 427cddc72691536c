//! `bulkhead`: the operator's command line. It makes keys, trust roots and volumes, signs bundles,
//! hands them to a host's agent, and recovers a volume's key or bytes when there is no Bulkhead left.
//!
//! | module | owns |
//! | --- | --- |
//! | `arguments` | the command line |
//! | `operator` | operators' keys, trust roots, signing |
//! | `recipient` | the keys of hosts and of recovery, secret and public |
//! | `volume` | making a volume: its key, file and stanza |
//! | `image` | the file behind a new volume, or one that grows |
//! | `reseal` | a volume's key for more hosts or another size |
//! | `rekey` | another key for a volume, and the record in its file from which the data plane begins |
//! | `record` | that record, as it is read: which part of a volume is under which key |
//! | `decrypt` | a volume's bytes under one key or two |
//! | `recover` | a volume's key from its recovery key, for `cryptsetup` |
//! | `export` | a volume's bytes, decrypted, to a stream or a file |
//! | `shred` | the order that destroys a volume's key, and the end of its sealed copies |
//! | `show` | what an envelope or a source says |
//! | `admin` | talking to a host's agent |
//! | `status` | what the agent answers, as a table or JSON |
//! | `host_keys` | of that: the host's key, and what was shredded |
//! | `release` | statements that a binary is a release |
//! | `upgrade` | running a release in the place of what runs |
//! | `programs` | of the status: which releases run |
//! | `output` | files written, times and texts for people |
//! | `failure` | the one error type: a text for the operator |
//!
//! Exit codes: 0 done, 1 refused or failed (the reason is on standard error), 2 usage.
#![forbid(unsafe_code)]

mod admin;
mod arguments;
mod decrypt;
mod export;
mod failure;
mod host_keys;
mod image;
mod json;
mod limits;
mod nics;
mod operator;
mod output;
mod programs;
mod recipient;
mod record;
mod recover;
mod rekey;
mod release;
mod reseal;
mod show;
mod shred;
mod status;
mod upgrade;
mod volume;

use std::process::ExitCode;

use arguments::{Arguments, Command, HostCommand, OperatorCommand};
use arguments::{RecoveryCommand, ReleaseCommand, TrustCommand, VolumeCommand};
use bulkhead_protocol::process;
use failure::Failure;

fn main() -> ExitCode {
    let arguments = Arguments::from_process();
    match lock_in().and_then(|()| run(arguments.command)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("bulkhead: {failure}");
            ExitCode::FAILURE
        }
    }
}

/// Before the first secret is read: no core file and no debugger shall see it.
fn lock_in() -> Result<(), Failure> {
    Ok(process::no_dump_no_privileges()?)
}

fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Operator(OperatorCommand::New(a)) => operator::new(&a),
        Command::Trust(TrustCommand::New(a)) => operator::trust(&a),
        Command::Sign(a) => operator::sign(&a),
        Command::Recovery(RecoveryCommand::New(a)) => recipient::recovery(&a),
        Command::Host(HostCommand::Init(a)) => recipient::host(&a),
        Command::Host(HostCommand::Public(a)) => recipient::public(&a),
        Command::Volume(VolumeCommand::Create(a)) => volume::create(&a),
        Command::Volume(VolumeCommand::Reseal(a)) => reseal::reseal(&a),
        Command::Volume(VolumeCommand::Rekey(a)) => rekey::rekey(&a),
        Command::Volume(VolumeCommand::Recover(a)) => recover::recover(&a),
        Command::Volume(VolumeCommand::Export(a)) => export::export(&a),
        Command::Volume(VolumeCommand::Shred(a)) => shred::shred(&a),
        Command::Show(a) => show::show(&a),
        Command::Apply(a) => admin::apply(&a),
        Command::Status(a) => admin::status(&a),
        Command::Release(ReleaseCommand::Sign(a)) => release::sign(&a),
        Command::Release(ReleaseCommand::Show(a)) => release::show(&a),
        Command::Upgrade(a) => upgrade::upgrade(&a),
    }
}
