// Search runs in a Worker, which browsers refuse to a page that was opened as a file. Then a hidden frame runs the
// worker's script instead. Its messages go both ways as a Worker's do.
class FrameWorker extends EventTarget {
  constructor(url) {
    super()
    const frame = document.createElement("iframe")
    frame.hidden = true
    document.body.appendChild(frame)
    this.frame = frame
    this.receive = event => {
      if (event.source !== frame.contentWindow) return
      const message = new MessageEvent("message", { data: event.data })
      this.dispatchEvent(message)
      if (this.onmessage) this.onmessage(message)
    }
    window.addEventListener("message", this.receive)
    this.ready = new Promise(resolve => {
      frame.onload = resolve
    })
    const inside = frame.contentDocument
    inside.open()
    inside.write(`<html><body><script>
      self.postMessage = data => parent.dispatchEvent(new MessageEvent("message", { data, source: self }))
      self.importScripts = (...urls) => urls.reduce((before, url) => before.then(() => new Promise(resolve => {
        const script = document.createElement("script")
        script.src = url
        script.onload = resolve
        document.body.appendChild(script)
      })), Promise.resolve())
    </script><script src="${url}"></script></body></html>`)
    inside.close()
  }
  postMessage(data) {
    this.ready.then(() => {
      const message = new MessageEvent("message", { data })
      const target = this.frame.contentWindow
      target.dispatchEvent(message)
    })
  }
  terminate() {
    window.removeEventListener("message", this.receive)
    this.frame.remove()
  }
}
if (location.protocol === "file:") window.Worker = FrameWorker
