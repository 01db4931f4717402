//! A relay between an instance and a server, which can be cut.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Passes bytes on to a port until it is cut.
pub struct Relay {
    pub address: SocketAddr,
    to: u16,
    passing: Option<JoinHandle<()>>,
}

impl Relay {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut relay = Self { address: listener.local_addr().unwrap(), to: port, passing: None };
        relay.pass(listener);
        relay
    }

    fn pass(&mut self, listener: TcpListener) {
        let to = self.to;
        self.passing = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                connections.spawn(async move {
                    if let Ok(mut far) = TcpStream::connect(("127.0.0.1", to)).await {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                    }
                });
            }
        }));
    }

    /// Breaks all connections off, and takes no more.
    pub async fn cut(&mut self) {
        if let Some(passing) = self.passing.take() {
            passing.abort();
            let _ = passing.await;
        }
    }

    /// Passes on again.
    pub async fn mend(&mut self) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.address).unwrap();
        self.pass(socket.listen(1024).unwrap());
    }

    pub fn url(&self) -> String {
        format!("redis://{}/0", self.address)
    }
}
