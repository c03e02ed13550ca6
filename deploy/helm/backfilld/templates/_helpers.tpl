{{- define "backfilld.name" -}}
{{- $name := contains "backfilld" .Release.Name | ternary .Release.Name (printf "%s-backfilld" .Release.Name) -}}
{{- $name | trunc 52 | trimSuffix "-" -}}
{{- end }}

{{- define "backfilld.selector" -}}
app.kubernetes.io/name: backfilld
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "backfilld.labels" -}}
{{ include "backfilld.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "backfilld.image" -}}
{{- if .Values.image.digest }}{{ printf "%s@%s" .Values.image.repository .Values.image.digest }}
{{- else }}{{ printf "%s:%s" .Values.image.repository (.Values.image.tag | default .Chart.AppVersion) }}{{ end }}
{{- end }}

{{/* The pod of the Deployment and of the Job; only the arguments and what comes after the end differ. */}}
{{- define "backfilld.pod" -}}
metadata:
  labels:
    {{- include "backfilld.labels" . | nindent 4 }}
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- if or .Values.podAnnotations (not .Values.job.existingConfigMap) }}
  annotations:
    {{- if not .Values.job.existingConfigMap }}
    # A changed job restarts the pods; what must not change in a started job is then refused with the reason.
    checksum/job: {{ .Values.job.files | toJson | sha256sum }}
    {{- end }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
spec:
  # It speaks to the database only, never to the Kubernetes API.
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriodSeconds }}
  restartPolicy: {{ eq .Values.mode "job" | ternary "Never" "Always" }}
  {{- with .Values.imagePullSecrets }}
  imagePullSecrets:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 65532
    runAsGroup: 65532
    fsGroup: 65532
    seccompProfile:
      type: RuntimeDefault
  containers:
    - name: backfilld
      image: {{ include "backfilld.image" . | quote }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      args: ["run", "/etc/backfilld/job"{{ if eq .Values.mode "job" }}, "--once"{{ end }}]
      env:
        # The lease names its holder.
        - name: BACKFILLD_INSTANCE
          valueFrom:
            fieldRef:
              fieldPath: metadata.name
        - name: BACKFILLD_DATABASE__URL
          value: {{ .Values.database.url | quote }}
        - name: BACKFILLD_DATABASE__PASSWORD_FILE
          value: /run/secrets/backfilld/password
        - name: BACKFILLD_DATABASE__DEDICATED_LOGIN
          value: {{ .Values.database.dedicatedLogin | quote }}
        {{- if .Values.database.caConfigMap.name }}
        - name: BACKFILLD_DATABASE__SSLROOTCERT
          value: /etc/backfilld/ca/ca.crt
        {{- end }}
        - name: BACKFILLD_HTTP__LISTEN
          value: "0.0.0.0:{{ .Values.http.port }}"
        {{- range $name, $value := .Values.settings }}
        - name: BACKFILLD_{{ $name }}
          value: {{ $value | quote }}
        {{- end }}
      ports:
        - name: http
          containerPort: {{ .Values.http.port }}
      startupProbe:
        httpGet: { path: /healthz, port: http }
        periodSeconds: 2
        failureThreshold: 30
      livenessProbe:
        httpGet: { path: /healthz, port: http }
        periodSeconds: 10
        timeoutSeconds: 3
      readinessProbe:
        httpGet: { path: /readyz, port: http }
        periodSeconds: 10
        timeoutSeconds: 3
      resources:
        {{- toYaml .Values.resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      volumeMounts:
        - name: job
          mountPath: /etc/backfilld/job
          readOnly: true
        - name: password
          mountPath: /run/secrets/backfilld
          readOnly: true
        {{- if .Values.database.caConfigMap.name }}
        - name: ca
          mountPath: /etc/backfilld/ca
          readOnly: true
        {{- end }}
  volumes:
    - name: job
      configMap:
        name: {{ .Values.job.existingConfigMap | default (printf "%s-job" (include "backfilld.name" .)) }}
    - name: password
      secret:
        secretName: {{ .Values.database.passwordSecret.name }}
        defaultMode: 0440
        items:
          - key: {{ .Values.database.passwordSecret.key }}
            path: password
    {{- if .Values.database.caConfigMap.name }}
    - name: ca
      configMap:
        name: {{ .Values.database.caConfigMap.name }}
        items:
          - key: {{ .Values.database.caConfigMap.key }}
            path: ca.crt
    {{- end }}
  {{- if eq .Values.mode "deployment" }}
  affinity:
    podAntiAffinity:
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: kubernetes.io/hostname
            labelSelector:
              matchLabels:
                {{- include "backfilld.selector" . | nindent 16 }}
  {{- end }}
  {{- with .Values.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .Values.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
