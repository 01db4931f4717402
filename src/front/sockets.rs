//! The listening sockets: bound here, handed over by systemd, or taken over from a process that serves still.
//!
//! Processes may share an address (`SO_REUSEPORT`): the kernel then gives each a part of the new connections. So a new one can
//! listen before the old one stops, and none is refused in between. What the old one's queue holds would be reset when it closes its
//! socket; therefore it first has the kernel drop what would begin a connection there ([`retire`]; the client repeats it, and it
//! reaches the new process), and accepts for a moment whatever had begun.

use std::io;
use std::net::{SocketAddr, TcpListener};

use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, Type};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;

/// A listening socket.
#[derive(Debug)]
pub struct Listener {
    /// The socket.
    pub socket: TcpListener,
    /// Whether somebody else, who goes on, holds it too: systemd.
    pub inherited: bool,
}

impl Listener {
    /// The same socket, for another thread.
    ///
    /// # Errors
    /// There are too many open files.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { socket: self.socket.try_clone()?, inherited: self.inherited })
    }
}

/// The sockets that systemd opened for this process, in the order of its unit.
#[must_use]
pub fn inherited() -> Vec<Listener> {
    let mut given = listenfd::ListenFd::from_env();
    let take = |at| given.take_tcp_listener(at).ok().flatten();
    // The main one, and that of the admin listener.
    let sockets: Vec<TcpListener> = (0..2).map_while(take).collect();
    let ready = |socket: TcpListener| socket.set_nonblocking(true).ok().map(|()| Listener { socket, inherited: true });
    sockets.into_iter().filter_map(ready).collect()
}

/// Binds a listener. A bare `[::]` serves IPv4 too. With `beside`, another process may serve the address already, which must have
/// been bound so too.
///
/// # Errors
/// The address is taken or not ours.
pub fn bind(address: SocketAddr, beside: bool) -> io::Result<Listener> {
    if !beside && address.port() != 0 {
        // Whoever listens there is found only without SO_REUSEPORT.
        open(address, false)?;
    }
    let socket = open(address, true)?;
    socket.listen(BACKLOG)?;
    Ok(Listener { socket: socket.into(), inherited: false })
}

fn open(address: SocketAddr, shared: bool) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        socket.set_only_v6(false)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Has the kernel drop what would begin a connection at this socket, while those that have begun go on. For a socket that another
/// process does not hold too.
///
/// # Errors
/// The kernel knows no such filters.
pub fn retire(listener: &impl std::os::fd::AsFd) -> io::Result<()> {
    // Classic BPF over the TCP header: the flags are in its fourteenth byte; drop what has SYN.
    const LOAD_BYTE: u16 = 0x30;
    const JUMP_IF_SET: u16 = 0x45;
    const RETURN: u16 = 0x06;
    const SYN: u32 = 0x02;
    let filter = [
        SockFilter::new(LOAD_BYTE, 0, 0, 13),
        SockFilter::new(JUMP_IF_SET, 0, 1, SYN),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ];
    SockRef::from(listener).attach_filter(&filter)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    use std::time::Duration;

    #[test]
    fn an_address_is_shared_only_with_whoever_means_to() {
        let one = bind("127.0.0.1:0".parse().unwrap(), false).unwrap();
        let address = one.socket.local_addr().unwrap();
        assert_eq!(bind(address, false).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        bind(address, true).unwrap();
    }

    #[test]
    fn a_retired_socket_takes_no_more_connections_and_loses_none() {
        let old = bind("127.0.0.1:0".parse().unwrap(), false).unwrap();
        let address = old.socket.local_addr().unwrap();
        let begun = TcpStream::connect(address).unwrap();
        let new = bind(address, true).unwrap();
        retire(&old.socket).unwrap();
        assert_eq!(old.socket.accept().unwrap().1, begun.local_addr().unwrap());
        new.socket.set_nonblocking(false).unwrap();
        let (accepted, accepting) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            while let Ok((_, peer)) = new.socket.accept() {
                accepted.send(peer).unwrap();
            }
        });
        let connect = move |_| TcpStream::connect_timeout(&address, Duration::from_secs(20)).unwrap();
        let connecting: Vec<_> = (0..8).map(|number| std::thread::spawn(move || connect(number))).collect();
        let mut peers = vec![accepting.recv().unwrap()];
        assert_eq!(old.socket.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        // What had reached the old one is repeated, and reaches the new one once the old one is gone.
        drop(old);
        let mut clients: Vec<_> = connecting.into_iter().map(|client| client.join().unwrap().local_addr().unwrap()).collect();
        peers.extend((1..8).map(|_| accepting.recv().unwrap()));
        peers.sort();
        clients.sort();
        assert_eq!(peers, clients);
    }
}
