//! The members of an etcd cluster as a client knows them: where each is, its connection, and which is asked first. Another list may take
//! the place of this one while requests are under way; they go on with the list that they began with.

use crate::order::Order;
use etcd_client::{Client, ConnectOptions};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// See the module.
pub struct Members {
    endpoints: Vec<String>,
    /// Made when first needed, thrown away when they fail.
    connections: Vec<Mutex<Option<Client>>>,
    order: Mutex<Order>,
}

impl Members {
    /// At these endpoints, the nearest first. Nothing is sent yet.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self {
            connections: endpoints.iter().map(|_| Mutex::default()).collect(),
            order: Mutex::new(Order::new(endpoints.len(), Instant::now())),
            endpoints,
        }
    }

    /// At these, with the connections to those that were known.
    pub fn changed(&self, endpoints: Vec<String>) -> Self {
        let new = Self::new(endpoints);
        for (endpoint, connection) in new.endpoints.iter().zip(&new.connections) {
            if let Some(old) = self.endpoints.iter().position(|e| e == endpoint) {
                *lock(connection) = lock(&self.connections[old]).clone();
            }
        }
        new
    }

    /// Where they are.
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.endpoints.len()
    }

    /// Which is asked first.
    pub fn order(&self) -> MutexGuard<'_, Order> {
        lock(&self.order)
    }

    /// The connection to one of them.
    ///
    /// # Errors
    /// None could be made.
    pub async fn connection(&self, index: usize, options: &ConnectOptions) -> Result<Client, String> {
        let known = lock(&self.connections[index]).clone();
        if let Some(client) = known {
            return Ok(client);
        }
        let endpoint = &self.endpoints[index];
        let client = Client::connect([endpoint], Some(options.clone()))
            .await
            .map_err(|e| format!("{endpoint}: {e}"))?;
        *lock(&self.connections[index]) = Some(client.clone());
        Ok(client)
    }

    /// Throws a connection away: the next one who needs it makes another.
    pub fn disconnect(&self, index: usize) {
        *lock(&self.connections[index]) = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
