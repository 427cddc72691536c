//! The ports that lead to interfaces of the host's, with the real kernel behind them: TAPs and AF_XDP sockets in
//! network namespaces of the tests' own.

mod afxdp;
mod host;
mod locked_in;
mod packets;
mod rig;
mod tap;
