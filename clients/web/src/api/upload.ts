// Forms with files. fetch does not tell how much of a body has been sent; XMLHttpRequest does.
import { ApiError, AWAY, ROOT, authorized, credentials, errorOf, refuse } from './client'

/** POST a form. `sent`: called with the part of it that has been sent. Throws ApiError; DOMException when aborted. */
export async function upload<T>(path: string, form: FormData, sent: (part: number) => void, signal: AbortSignal): Promise<T> {
  const used = credentials.key()
  const request = new XMLHttpRequest()
  request.open('POST', ROOT + path)
  authorized().forEach((value, name) => request.setRequestHeader(name, value))
  request.upload.onprogress = ({ loaded, total }) => sent(total ? loaded / total : 0)
  const end = () => request.abort()
  signal.addEventListener('abort', end)
  try {
    await new Promise<void>((resolve, reject) => {
      request.onload = () => resolve()
      request.onabort = () => reject(new DOMException('', 'AbortError'))
      // A server that refuses a body before its end may close the connection under it.
      request.onerror = () => reject(new ApiError(0, null, `${AWAY} Or it closed the connection before all was sent, as it does with what is too large.`))
      request.send(form)
    })
  } finally {
    signal.removeEventListener('abort', end)
  }
  const body = parsed(request.responseText)
  if (request.status < 200 || request.status > 299) refuse(errorOf(request.status, body), used)
  return body as T
}

function parsed(text: string): unknown {
  try {
    return JSON.parse(text)
  } catch {
    return null
  }
}
