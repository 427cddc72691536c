//! Ports: what each of them must do, what only a switch does, and whether a guest sends as itself.

mod afxdp;
mod bridged;
mod frames;
mod guard;
mod mirror;
mod null;
mod rig;
mod suite;
mod switch;
mod tap;
mod uplink;
