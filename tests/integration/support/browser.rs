//! A headless Chromium, told what to do over the pipe of its DevTools protocol.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use super::process::{Process, scratch};

/// A page in a browser of its own.
pub struct Page {
    _browser: Process,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    session: String,
    sent: u64,
    /// Exceptions, and what was written to the console or its log.
    pub complaints: Vec<String>,
}

impl Page {
    /// Opens a URL in a window of this size, in a dark room or a light one.
    pub fn open(url: &str, (width, height): (u32, u32), dark: bool) -> Self {
        let dir = scratch();
        let profile = format!("--user-data-dir={}", dir.display());
        let mut command = Command::new("sh");
        // The protocol's messages come in on the descriptor 3 and go out on 4.
        command.args(["-c", "exec \"$@\" 3<&0 4>&1 </dev/null >/dev/null 2>&1", "sh", "chromium-headless-shell"]);
        command.args(["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe", &profile, "about:blank"]);
        let mut browser = Process::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()), dir);
        let input = browser.child.stdin.take().unwrap();
        let output = BufReader::new(browser.child.stdout.take().unwrap());
        let mut page = Self { _browser: browser, input, output, session: String::new(), sent: 0, complaints: Vec::new() };
        let target = page.tell("Target.createTarget", &json!({ "url": "about:blank" }))["targetId"].clone();
        let attached = page.tell("Target.attachToTarget", &json!({ "targetId": target, "flatten": true }));
        attached["sessionId"].as_str().unwrap().clone_into(&mut page.session);
        for domain in ["Page", "Runtime", "Log", "Accessibility"] {
            page.tell(&format!("{domain}.enable"), &json!({}));
        }
        let metrics = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600 });
        page.tell("Emulation.setDeviceMetricsOverride", &metrics);
        let scheme = json!({ "name": "prefers-color-scheme", "value": if dark { "dark" } else { "light" } });
        page.tell("Emulation.setEmulatedMedia", &json!({ "features": [scheme] }));
        page.tell("Page.navigate", &json!({ "url": url }));
        page
    }

    /// Sends a command, and returns its result.
    pub fn tell(&mut self, method: &str, parameters: &Value) -> Value {
        self.sent += 1;
        let mut message = json!({ "id": self.sent, "method": method, "params": parameters });
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        self.input.write_all(message.to_string().as_bytes()).and_then(|()| self.input.write_all(b"\0")).unwrap();
        loop {
            let mut bytes = Vec::new();
            self.output.read_until(0, &mut bytes).unwrap();
            assert!(!bytes.is_empty(), "Chromium ended (is chromium-headless-shell installed?)");
            bytes.pop();
            let answer: Value = serde_json::from_slice(&bytes).unwrap();
            if answer["id"] == self.sent {
                assert!(answer["error"].is_null(), "{method}: {answer}");
                return answer["result"].clone();
            }
            if matches!(answer["method"].as_str(), Some("Runtime.exceptionThrown" | "Runtime.consoleAPICalled" | "Log.entryAdded")) {
                self.complaints.push(answer["params"].to_string());
            }
        }
    }

    /// The value of an expression.
    pub fn value(&mut self, expression: &str) -> Value {
        let asked = json!({ "expression": expression, "awaitPromise": true, "returnByValue": true });
        let answer = self.tell("Runtime.evaluate", &asked);
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].clone()
    }

    /// Waits until an expression is true.
    pub async fn until(&mut self, expression: &str) {
        for _ in 0..600 {
            if self.value(expression) == true {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        panic!("it never came true: {expression}");
    }

    /// Presses a key.
    pub fn press(&mut self, key: &str) {
        let (code, text) = match key {
            "Tab" => (9, None),
            "Enter" => (13, Some("\r")),
            "Escape" => (27, None),
            other => panic!("{other}"),
        };
        for kind in ["keyDown", "keyUp"] {
            let mut event = json!({ "type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code });
            if let Some(text) = text.filter(|_| kind == "keyDown") {
                event["text"] = json!(text);
            }
            self.tell("Input.dispatchKeyEvent", &event);
        }
    }

    /// Types a text where the focus is.
    pub fn type_text(&mut self, text: &str) {
        self.tell("Input.insertText", &json!({ "text": text }));
    }

    /// Presses Tab until the element of this id has the focus.
    pub fn tab_to(&mut self, id: &str) {
        for _ in 0..60 {
            self.press("Tab");
            if self.value("document.activeElement.id") == id {
                return;
            }
        }
        panic!("{id} cannot be reached by keyboard");
    }

    /// What a screen reader is told: roles and names of all that is not ignored.
    pub fn accessible(&mut self) -> Vec<(String, String)> {
        let tree = self.tell("Accessibility.getFullAXTree", &json!({}));
        let nodes = tree["nodes"].as_array().unwrap().iter().filter(|node| node["ignored"] != true);
        let text = |value: &Value| value["value"].as_str().unwrap_or_default().to_owned();
        nodes.map(|node| (text(&node["role"]), text(&node["name"]))).collect()
    }

    /// A picture of the whole page, as PNG in base64.
    pub fn picture(&mut self) -> String {
        let taken = self.tell("Page.captureScreenshot", &json!({ "format": "png", "captureBeyondViewport": true }));
        taken["data"].as_str().unwrap().to_owned()
    }
}
