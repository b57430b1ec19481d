// What eslint looks for in the page's script; `tox -e lint` runs it. Faults alone: a style is nobody's fault.
const FAULTS = [
  // names that are not there, or that nobody uses
  "no-undef", "no-unused-vars", "no-useless-assignment", "no-shadow-restricted-names", "no-global-assign",
  // code that can't run, or always does the same
  "no-unreachable", "no-unreachable-loop", "no-constant-condition", "no-constant-binary-expression", "no-dupe-else-if", "no-duplicate-case", "no-fallthrough",
  "no-self-assign", "no-self-compare", "no-unmodified-loop-condition", "for-direction", "no-empty", "no-loss-of-precision", "no-unsafe-finally",
  // one thing written, another meant
  "eqeqeq", "no-cond-assign", "no-dupe-keys", "no-dupe-class-members", "no-sparse-arrays", "no-unsafe-negation", "no-template-curly-in-string", "use-isnan",
  "valid-typeof", "array-callback-return", "getter-return", "no-const-assign", "no-func-assign", "no-import-assign", "no-setter-return", "no-ex-assign",
  "no-empty-character-class", "no-invalid-regexp", "no-misleading-character-class", "no-useless-backreference", "no-var",
  // promises whose errors are lost
  "no-async-promise-executor", "no-promise-executor-return", "require-await",
  // text run as a program
  "no-eval", "no-implied-eval", "no-new-func", "no-script-url",
];
// What a browser gives to a script. confirm, alert, prompt and event are left out.
const BROWSER = "window document location history navigator localStorage sessionStorage fetch atob btoa setTimeout clearTimeout " +
  "setInterval clearInterval queueMicrotask requestAnimationFrame cancelAnimationFrame matchMedia getComputedStyle " +
  "getSelection devicePixelRatio innerHeight innerWidth scrollX scrollY scrollTo addEventListener removeEventListener " +
  "console performance crypto structuredClone AbortController AbortSignal URLSearchParams URL Event CustomEvent " +
  "KeyboardEvent Node HTMLElement Element DOMException DOMParser ResizeObserver IntersectionObserver MutationObserver " +
  "TextDecoder TextEncoder NodeFilter XMLSerializer Blob File FormData Notification CSS Intl";

export default [{
  files: ["**/*.js"],
  languageOptions: {sourceType: "module", ecmaVersion: 2022, globals: Object.fromEntries(BROWSER.split(" ").map((name) => [name, "readonly"]))},
  linterOptions: {reportUnusedDisableDirectives: "error"},
  rules: {
    ...Object.fromEntries(FAULTS.map((name) => [name, "error"])),
    "no-unused-vars": ["error", {ignoreRestSiblings: true}], // {a, ...others} leaves a out
  },
}];
