//! A relay between an instance and a server, which can be cut.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{JoinHandle, JoinSet};

/// Passes bytes on to a port until it is cut.
pub struct Relay {
    pub address: SocketAddr,
    to: u16,
    /// Bytes that it passes back in a tenth of a second, for each connection.
    rate: usize,
    passing: Option<JoinHandle<()>>,
}

impl Relay {
    pub async fn to(port: u16) -> Self {
        Self::with_rate(port, usize::MAX).await
    }

    /// A network that carries no more than this many bytes a second back, for each connection.
    pub async fn slow(port: u16, rate: usize) -> Self {
        Self::with_rate(port, rate / 10).await
    }

    async fn with_rate(port: u16, rate: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut relay = Self { address: listener.local_addr().unwrap(), to: port, rate, passing: None };
        relay.pass(listener);
        relay
    }

    fn pass(&mut self, listener: TcpListener) {
        let (to, rate) = (self.to, self.rate);
        self.passing = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                connections.spawn(async move {
                    let Ok(mut far) = TcpStream::connect(("127.0.0.1", to)).await else { return };
                    if rate == usize::MAX {
                        let _ = tokio::io::copy_bidirectional(&mut near, &mut far).await;
                        return;
                    }
                    let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (near.split(), far.split());
                    let back = async {
                        let mut bytes = vec![0; rate];
                        while let Ok(read @ 1..) = from_far.read(&mut bytes).await {
                            to_near.write_all(&bytes[..read]).await?;
                            tokio::time::sleep(Duration::from_millis(100) * u32::try_from(read).unwrap() / u32::try_from(rate).unwrap())
                                .await;
                        }
                        std::io::Result::Ok(())
                    };
                    tokio::select! {
                        _ = back => {}
                        _ = tokio::io::copy(&mut from_near, &mut to_far) => {}
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
